"""Templates with the vocabularies they were made for: what is learnt is what the answers say.

Needs `python tests/data/public_vocabularies.py` once; skipped where the cache does not hold them.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_encoder
from public_vocabularies import VOCABULARIES, folder_of
from tokenizers import Tokenizer

from vistune.data.count import TokenCounter
from vistune.data.encode import Encoder
from vistune.data.template import Segment, template_of
from vistune.models.facts import load_tokenizer
from vistune.types import Turn

TEMPLATES_OF = {
    "llama2": ("plain", "vicuna_v0", "vicuna_v1", "llama_2"),
    "qwen2_5": ("qwen", "chatml"),
    "internlm2": ("internlm2_chat",),
    "llama3": ("llama3", "cogvlm2_chat", "cogvlm2_vqa"),
    "gemma3": ("gemma",),
}
assert set(TEMPLATES_OF) == set(VOCABULARIES)
NAMED = [(v, template) for v, templates in TEMPLATES_OF.items() for template in templates]

EASY = (
    Turn("user", (0, "\nWhat is in the picture?")),
    Turn("assistant", ("A cat, two dogs and 12 birds.",)),
)
TALKS = (
    EASY,
    (
        Turn("user", (0, "\n图片里有什么？")),
        Turn("assistant", ("一只猫坐在红色的沙发上。",)),
        Turn("user", ("再说一遍，用English。",)),
        Turn("assistant", ("A cat on a red sofa — déjà vu 😀.",)),
    ),
    (
        Turn("user", ("Write code.",)),
        Turn("assistant", ("def f(x):\n    return x + 1\n\n\tend",)),
        Turn("user", ("  spaces  around  ",)),
        Turn("assistant", (" leading blank",)),
    ),
)


@functools.cache
def tokenizer_of(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = folder_of(name)
    if folder is None:
        pytest.skip(f"no vocabulary of {name}: python tests/data/public_vocabularies.py")
    # Not AutoTokenizer, which puts classes of its own in the place of what the file says.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, with every blank that a piece stands for; `decode` leaves some out."""
    out = b""
    levels = _bytes_of_letters()
    pieces = tokenizer.get_vocab()
    by_letters = "Ġa" in pieces
    special = set(tokenizer.added_tokens_decoder)
    for token_id, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if by_letters and token_id in special:
            out += piece.encode()
        elif by_letters:
            out += bytes(levels[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            out += bytes([int(piece[3:5], 16)])
        else:
            out += piece.replace("▁", " ").encode()
    return out.decode()


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes as (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = [*plain, *(256 + place for place in range(len(others)))]
    return {chr(letter): byte for letter, byte in zip(shown, [*plain, *others], strict=True)}


def learnt(segments: list[Segment]) -> list[str]:
    """The stretches of text that are learnt."""
    out: list[str] = []
    before = False
    for segment in segments:
        if segment.is_target and segment.text:
            out = [*out[:-1], out[-1] + segment.text] if before else [*out, segment.text]
        before = segment.is_target
    return out


def runs(encoder: Encoder, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    return [
        spelled(encoder.tokenizer, ids[start:end].tolist())
        for start, end in edges.reshape(-1, 2).tolist()
    ]


@pytest.mark.parametrize(("vocabulary", "template"), NAMED)
def test_what_is_learnt_is_what_the_answers_say(vocabulary: str, template: str) -> None:
    encoder = make_encoder(template, tokenizer_of(vocabulary))
    counter = TokenCounter(encoder)
    for talk in (EASY,) if template == "plain" else TALKS:
        tokens = encoder.tokenise_turns(talk, [(28, 28)])
        expected = learnt(encoder.segments(talk))
        found = runs(encoder, tokens.ids, tokens.mask)
        if template == "plain":  # the text begins with what is learnt, and pieces with a blank
            found = [found[0].removeprefix(" ")]
        assert found == expected
        counts = counter.count(talk, [(28, 28)])
        assert counts.tokens == tokens.ids.size
        assert counts.target_tokens == int(tokens.mask[1:].sum())
        assert len(encoder.stop_token_ids) >= 1
        # Nothing else is: the rest of the text is there too, and not learnt.
        text = "".join(s.text for s in encoder.segments(talk))
        plain = spelled(encoder.tokenizer, [i for i in tokens.ids if i != encoder.image_token_id])
        assert text.replace(" ", "") in plain.replace(" ", "")


@pytest.mark.parametrize("vocabulary", [v for v in TEMPLATES_OF if v != "llama2"])
def test_own_template_gives_transformers_ids(vocabulary: str) -> None:
    tokenizer = tokenizer_of(vocabulary)
    encoder = make_encoder(template_of(tokenizer), tokenizer)
    talk = (Turn("user", ("What is 12 x 3?",)), Turn("assistant", ("It is 36, 三十六。",)))
    messages = [{"role": turn.speaker, "content": turn.text} for turn in talk]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    tokens = encoder.tokenise_turns(talk, [])
    assert tokens.ids.tolist() == expected
    found = runs(encoder, tokens.ids, tokens.mask)
    assert len(found) == 1 and found[0].strip().startswith("It is 36, 三十六。")


def test_the_named_template_of_internlm2_is_its_own() -> None:
    tokenizer = tokenizer_of("internlm2")
    talk = (Turn("user", ("What is it?",)), Turn("assistant", ("A cat.",)))
    named = make_encoder("internlm2_chat", tokenizer).tokenise_turns(talk, [])
    own = make_encoder(template_of(tokenizer), tokenizer).tokenise_turns(talk, [])
    assert named.ids.tolist() == own.ids.tolist()
    assert named.mask.tolist() == own.mask.tolist()


def test_a_directory_gives_the_ids_its_file_states(tmp_path: Path) -> None:
    folder = folder_of("llama2")
    if folder is None:
        pytest.skip("no vocabulary of llama2: python tests/data/public_vocabularies.py")
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for model_type in ("llama", "llava", "mistral"):
        made = tmp_path / model_type
        shutil.copytree(folder, made)
        (made / "config.json").write_text(json.dumps({"model_type": model_type}))
        tokenizer, _ = load_tokenizer(str(made), key="test")
        for text in (
            " lead",
            "a    b",
            "USER: What?  ASSISTANT:",
            "def f(x):\n    return",
            "你好 😀",
        ):
            assert tokenizer.encode(text) == stated.encode(text).ids
