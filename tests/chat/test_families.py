"""Conversations with tiny models of the families: what every prompt holds, what is shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_dirs import FAMILY_KINDS, LLAVA_KIND, write_family, write_pictures

from vistune.assembly import load_assembled
from vistune.chat.terminal import ChatOptions, run_chat
from vistune.data.encode import Encoder
from vistune.errors import RowError
from vistune.generate import Prompt, generate, stream
from vistune.types import Turn

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
# What stands for the image is written #, and A for the first answer.
PROMPTS = {
    "cogvlm2": (
        "<|begin_of_text|>#Question: what is it Answer:",
        "<|begin_of_text|>#Question: what is it Answer: A\nQuestion: and then Answer:",
    ),
    "visualglm": (
        "<img>#</img>问：what is it\n答：[gMASK]<sop>",
        "<img>#</img>问：what is it\n答：A\n问：and then\n答：[gMASK]<sop>",
    ),
    "mgm-2b": (
        "<bos><start_of_turn>user\n#\nwhat is it<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\n#\nwhat is it<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>"
        "\n<eos><start_of_turn>user\nand then<end_of_turn>\n<start_of_turn>model\n",
    ),
    LLAVA_KIND: (
        f"{VICUNA} USER: #\nwhat is it ASSISTANT:",
        f"{VICUNA} USER: #\nwhat is it ASSISTANT: A</s>USER: and then ASSISTANT:",
    ),
}
SAME = {"visualglm-sat": "visualglm", "mgm-2b-hd": "mgm-2b"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    write_pictures(root / "pictures")
    for kind in (*FAMILY_KINDS, LLAVA_KIND):
        write_family(kind, root / kind)
    return root


@pytest.mark.parametrize("kind", [*FAMILY_KINDS, LLAVA_KIND])
def test_two_rounds_about_a_picture(
    shelf: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []

    def told(speaker: Any, encoder: Encoder, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Lets the model answer, notes the prompt, and says A for it."""
        list(stream(speaker, encoder, prompt, **options))
        prompts.append(written(encoder, prompt))
        yield "A"

    monkeypatch.setattr("vistune.chat.speaker.stream", told)
    picture = shelf / "pictures" / "0.png"
    lines = [f"/image {picture}", "what is it", "and then", "/reset", "what is it"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    options = ChatOptions(max_new_tokens=3, device="cpu", dtype="fp32")
    assert run_chat(shelf / kind, options) == 0
    assert capsys.readouterr().out == "A\n" * 3
    first, second = PROMPTS[SAME.get(kind, kind)]
    # After /reset there is neither history nor picture.
    blind = re.sub("<img>#</img>|#\n?", "", first)
    assert prompts == [first, second, blind]


def written(encoder: Encoder, prompt: Prompt) -> str:
    """Returns a prompt as its tokens spell it, with # for an image's."""
    ids = encoder.encode_prompt(prompt.turns, prompt.images).input_ids.tolist()
    out, piece = "", []
    for index, token in enumerate(ids):
        if token != encoder.image_token_id:
            piece.append(token)
        elif index == 0 or ids[index - 1] != encoder.image_token_id:
            out, piece = f"{out}{encoder.tokenizer.decode(piece)}#", []
    return out + str(encoder.tokenizer.decode(piece))


def ask(shelf: Path, kind: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return run_chat(shelf / kind, ChatOptions(max_new_tokens=2, device="cpu", dtype="fp32"))


def test_a_second_picture_and_a_system_prompt_are_refused_by_name(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = f"/image {shelf / 'pictures' / '0.png'}"
    assert ask(shelf, "visualglm", [picture, "what", picture, "what"], monkeypatch) == 1
    assert "takes one image" in capsys.readouterr().err
    options = ChatOptions(prompt="what", system="be brief", device="cpu", dtype="fp32")
    with pytest.raises(RowError, match="no place for a system prompt"):
        run_chat(shelf / "cogvlm2", options)


@pytest.mark.parametrize("version", ["base", "vqa"])
def test_the_other_cogvlm2_models(
    shelf: Path,
    tmp_path: Path,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_family("cogvlm2", tmp_path / "cogvlm2")
    settings = json.loads((folder / "config.json").read_text()) | {"template_version": version}
    (folder / "config.json").write_text(json.dumps(settings))
    encoder = load_assembled(folder).encoder
    asked = Prompt((Turn("user", ("what is it",)),))
    expected = {"base": "what is it", "vqa": "Question: what is it Short answer:"}[version]
    assert written(encoder, asked) == f"<|begin_of_text|>{expected}"
    assert ask(tmp_path, "cogvlm2", ["one", "two"], monkeypatch) == (version == "base")
    # A base model has no rounds.
    assert ("takes one question" in capsys.readouterr().err) == (version == "base")


def test_a_visualglm_answer_is_shown_as_its_public_chat_shows_it(shelf: Path) -> None:
    assembled = load_assembled(shelf / "visualglm")
    tokenizer = assembled.encoder.tokenizer
    said = tokenizer.encode(" 你好:图里有猫\n", add_special_tokens=False)
    said.append(tokenizer.convert_tokens_to_ids("<eop>"))

    class Fixed(torch.nn.Module):
        """Says one text, whatever it is asked."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner, self.step = model, 0

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            out.logits[:] = 0.0
            out.logits[:, -1, said[self.step]] = 1.0
            self.step += 1
            return out

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    prompt = Prompt((Turn("user", ("图里有什么",)),))
    model = assembled.model
    [shown] = generate(Fixed(model), assembled.encoder, [prompt], max_new_tokens=40)
    assert shown == "你好：图里有猫"
    pieces = list(stream(Fixed(model), assembled.encoder, prompt, max_new_tokens=40))
    assert len(pieces) > 2 and "".join(pieces) == shown
