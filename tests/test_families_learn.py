"""Every family on photographs: twenty steps bring the loss down; a cache changes no token."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "models"))

from family_dirs import FAMILY_KINDS, LLAVA_KINDS, PARITY, byte_tokenizer, write_family
from real_pictures import write_real_pictures
from tiny_parts import write_tower

from vistune.assembly import Assembled, load_assembled
from vistune.checkpoint.run_dir import RunDirectory
from vistune.generate import Prompt, generate
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train
from vistune.types import ImageRef, Turn

INTERNLM2_KIND = "llava-internlm2"
KINDS = (*FAMILY_KINDS, *LLAVA_KINDS, INTERNLM2_KIND)
STEPS = 20


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("learn")
    write_real_pictures(root / "pictures")
    for kind in (*FAMILY_KINDS, *LLAVA_KINDS):
        write_family(kind, root / kind)
    language = root / "internlm2"
    language.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / "internlm2" / name, language)
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    byte_tokenizer(specials, bos="<s>", eos="</s>").save_pretrained(language)
    write_tower(root / "tower")
    return root


def model_of(shelf: Path, kind: str) -> dict[str, Any]:
    if kind != INTERNLM2_KIND:
        return {"from_checkpoint": str(shelf / kind)}
    return {
        "vision_tower": {"path": str(shelf / "tower")},
        "language_model": {"path": str(shelf / "internlm2")},
    }


def learnt(shelf: Path, kind: str, run_dir: Path) -> list[float]:
    """Trains on the photographs; returns the losses."""
    pictures = shelf / "pictures"
    internlm2 = {"template": "internlm2_chat"} if kind == INTERNLM2_KIND else {}
    tree = {
        "name": "learn",
        "run_dir": str(run_dir),
        "device": "cpu",
        "dtype": "fp32",
        "model": model_of(shelf, kind),
        "tune": {role: {"mode": "full"} for role in ("vision", "connector", "language")},
        "data": {
            "train": [{"path": str(pictures / "train.json"), "images": str(pictures)}],
            "workers": 0,
            **internlm2,
        },
        "batch": {"samples": 7, "max_tokens": 1024},
        "train": {"steps": STEPS, "lr": 2e-3, "schedule": "constant", "warmup_frac": 0.0},
        "log": {"tensorboard": False, "progress": False},
    }
    made = ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")
    train(made, console=Console(quiet=True))
    lines = RunDirectory(run_dir).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_on_photographs_and_answers_with_and_without_a_cache(
    shelf: Path, tmp_path: Path, kind: str
) -> None:
    losses = learnt(shelf, kind, tmp_path / "run")
    assert len(losses) == STEPS
    # Every step sees every picture, so steps compare; the first loss is near that of guessing.
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0], losses
    trained = load_assembled(tmp_path / "run")
    picture = shelf / "pictures" / "0.jpg"
    asked = [
        Prompt((Turn("user", (0, "\n", "what is it")),), (ImageRef(picture, "0.jpg"),)),
        Prompt((Turn("user", ("what is it to be here",)),)),
    ]
    together = generate(trained.model, trained.encoder, asked, max_new_tokens=8)
    assert together == [uncached(trained, prompt, num_tokens=8) for prompt in asked]
    assert any(together)


@torch.no_grad()
def uncached(assembled: Assembled, prompt: Prompt, *, num_tokens: int) -> str:
    """Greedy decoding that runs the whole text anew for every token."""
    encoder, model = assembled.encoder, assembled.model
    sample = encoder.encode_prompt(prompt.turns, prompt.images)
    ids = torch.from_numpy(sample.input_ids)[None]
    shapes = sample.image_shapes
    pixels = [torch.from_numpy(one if shapes else one[None]) for one in sample.pixel_values]
    said: list[int] = []
    for _ in range(num_tokens):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = torch.cat(pixels) if pixels else None
        if shapes:
            inputs["image_shapes"] = shapes
        scores: Tensor = model(**inputs, use_cache=False).logits[0, -1]
        if encoder.image_token_id < scores.shape[0]:
            scores[encoder.image_token_id] = float("-inf")
        chosen = int(scores.argmax())
        if chosen in encoder.stop_token_ids:
            break
        said.append(chosen)
        ids = torch.cat((ids, torch.tensor([[chosen]])), dim=1)
    text = encoder.tokenizer.decode(
        said, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return encoder.template.shown(text)
