"""Whole runs with images in tiles (LLaVA-1.6) and at several scales (S2), and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_loop import losses, resolved

from vistune.assembly import Assembled, load_assembled
from vistune.checkpoint.layouts import describe_directory
from vistune.errors import DataError, ModelError
from vistune.export import export_model
from vistune.generate import Prompt, generate
from vistune.train import train
from vistune.types import Turn

QUIET = Console(quiet=True)
FULL = {"mode": "full"}
LORA = {"mode": "lora", "rank": 4, "alpha": 8}
GRIDS = {"grids": [[1, 2], [2, 1], [2, 2]]}
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def stages(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 sees squares, stage 2 tiles."""
    folder = tmp_path_factory.mktemp("stages")
    first = {"tune": {"connector": FULL}, "train": {"steps": 2}}
    train(resolved(tiny, folder / "one", **first), console=QUIET)
    train(resolved(tiny, folder / "two", **second_stage(folder)), console=QUIET)
    return folder


def second_stage(folder: Path) -> dict[str, Any]:
    return {
        "model": {"from_checkpoint": str(folder / "one"), "tiles": GRIDS},
        "tune": {"connector": FULL, "language": LORA},
        "save": {"every_steps": 3},
        "data": {"image": {}},
        "sample": {"prompts": ["What?"], "max_new_tokens": 2},
    }


def answers(found: Assembled) -> list[str]:
    prompts = [
        Prompt([Turn("user", (0, "\nWhat do you see?"))], [WIDE]),
        Prompt([Turn("user", (0, "\nWhere?"))], [WIDE.resize((40, 40))]),
    ]
    return generate(found.model, found.encoder, prompts, max_new_tokens=8)


@torch.no_grad()
def logits(found: Assembled) -> torch.Tensor:
    sample = found.encoder.encode_prompt([Turn("user", (0, "\nWhat?"))], [WIDE])
    model: Any = found.model
    pixels = sample.pixel_values[0]
    out: torch.Tensor = model(
        input_ids=torch.from_numpy(sample.input_ids)[None],
        pixel_values=torch.from_numpy(pixels if sample.image_shapes else pixels[None]),
        image_shapes=sample.image_shapes,
    ).logits
    return out


def test_tiles_come_in_stage_two_and_resume(stages: Path, tiny: Path) -> None:
    whole = losses(stages / "two")
    assert whole[-1][1] < whole[0][1]
    last = stages / "two" / "checkpoints" / f"step_{len(whole):08d}"
    assert "tiles.image_newline" in load_file(last / "weights.safetensors")
    # Stage 1 padded images to squares, which a long one would not have fitted into.
    assert load_assembled(stages / "two").encoder.image_plan.mode == "resize"
    (last / "COMPLETE").unlink()
    train(resolved(tiny, stages / "two", **second_stage(stages)), resume=True, console=QUIET)
    assert losses(stages / "two") == whole


def test_a_newline_that_does_not_train_is_kept(stages: Path, tiny: Path, tmp_path: Path) -> None:
    stage = second_stage(stages) | {"tune": {"language": LORA, "connector": {}}}
    stage["tune"]["connector"] = {"mode": "freeze"}
    result = train(resolved(tiny, tmp_path / "r", **stage, seed=11), console=QUIET)
    kept = load_file(result.checkpoint / "inherited.safetensors")["tiles.image_newline"]
    further = {**stage, "model": {"from_checkpoint": str(tmp_path / "r")}}
    train(resolved(tiny, tmp_path / "s", **further, seed=12), console=QUIET)
    model: Any = load_assembled(tmp_path / "s").model
    assert torch.equal(model.tiles.image_newline, kept)


@pytest.mark.parametrize("to", ["vistune", "hf", "llava"])
def test_exports_answer_the_same(stages: Path, tmp_path: Path, to: Any) -> None:
    found = load_assembled(stages / "two")
    out = export_model(stages / "two", to=to, output=tmp_path / "out")
    again = load_assembled(out)
    expected = logits(found)
    reached = logits(Assembled(again.model, found.encoder, out))[..., : expected.shape[-1]]
    torch.testing.assert_close(reached, expected, atol=2e-5, rtol=2e-5)
    assert again.encoder.layout == found.encoder.layout
    # A tokenizer that was written and read again may drop the blank in front.
    said, again_said = answers(found), answers(again)
    assert [text.strip() for text in again_said] == [text.strip() for text in said]
    second = export_model(out, to=to, output=tmp_path / "again")
    weights = load_file(out / "model.safetensors")
    for name, tensor in load_file(second / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_the_original_layout_says_what_it_is(stages: Path, tmp_path: Path) -> None:
    out = export_model(stages / "two", to="llava", output=tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["mm_patch_merge_type"] == "spatial_unpad"
    assert values["image_aspect_ratio"] == "anyres"
    # Width first, as the original reads them.
    assert values["image_grid_pinpoints"] == [[112, 56], [56, 112], [112, 112]]
    assert "model.image_newline" in load_file(out / "model.safetensors")
    values["image_grid_pinpoints"] = "[(112, 56), (56, 112), (112, 112)]"
    (out / "config.json").write_text(json.dumps(values))
    layout = describe_directory(out).layout
    assert layout is not None and layout["grids"] == [[1, 2], [2, 1], [2, 2]]
    for wrong in ({"mm_patch_merge_type": "spatial"}, {"image_aspect_ratio": "pad"}):
        (out / "config.json").write_text(json.dumps(values | wrong))
        with pytest.raises(ModelError, match=str(next(iter(wrong.values())))):
            describe_directory(out)


def test_transformers_reads_ids_pixels_and_answers(stages: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    found = load_assembled(stages / "two")
    out = export_model(stages / "two", to="hf", output=tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    assert type(processor).__name__ == "LlavaNextProcessor"
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat do you see?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, images=WIDE, return_tensors="pt")
    ours = found.encoder.encode_prompt([Turn("user", (0, "\nWhat do you see?"))], [WIDE])
    assert inputs["input_ids"][0].tolist() == ours.input_ids.tolist()
    np.testing.assert_array_equal(inputs["pixel_values"][0].numpy(), ours.pixel_values[0])
    theirs = LlavaNextForConditionalGeneration.from_pretrained(out).eval()
    said = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answers(found)[0].strip()


def test_an_adapter_export_has_the_newline_beside_it(stages: Path, tmp_path: Path) -> None:
    out = export_model(stages / "two", to="adapter", output=tmp_path / "out")
    model: Any = load_assembled(stages / "two").model
    newline = load_file(out / "tiles.safetensors")["tiles.image_newline"]
    assert torch.equal(newline, model.tiles.image_newline)
    with pytest.raises(ModelError, match="tiles"):
        export_model(stages / "two", to="xtuner", output=tmp_path / "x")


def test_fused_layers_see_tiles_too(stages: Path, tiny: Path, tmp_path: Path) -> None:
    stage = second_stage(stages) | {"train": {"fused": "on"}}
    train(resolved(tiny, tmp_path / "r", **stage), console=QUIET)
    plain = [loss for _, loss, _ in losses(stages / "two")]
    # The fused backward adds in another order: 1e-6 a step.
    assert [loss for _, loss, _ in losses(tmp_path / "r")] == pytest.approx(plain, rel=1e-5)


def test_tiles_for_a_directory_that_has_none(tiny: Path, tmp_path: Path) -> None:
    """A LLaVA-1.5 of transformers goes on with tiles; one with tiles takes no others."""
    stage = {
        "model": {"from_checkpoint": str(tiny / "hf"), "tiles": GRIDS},
        "tune": {"connector": FULL},
        "train": {"steps": 2},
        "data": {"image": {}},
    }
    train(resolved(tiny, tmp_path / "r", **stage), console=QUIET)
    out = export_model(tmp_path / "r", to="hf", output=tmp_path / "out")
    assert describe_directory(out).layout is not None
    same = {**stage, "model": {"from_checkpoint": str(out), "tiles": GRIDS}}
    train(resolved(tiny, tmp_path / "s", **same), console=QUIET)
    other = {**stage, "model": {"from_checkpoint": str(out), "tiles": {}}}
    with pytest.raises(ModelError, match="cannot be cut"):
        train(resolved(tiny, tmp_path / "t", **other), console=QUIET)


def test_fewer_tokens_for_an_image(stages: Path, tiny: Path, tmp_path: Path) -> None:
    stage = second_stage(stages)
    stage["data"] = {"image": {"max_tokens": 60}}
    train(resolved(tiny, tmp_path / "r", **stage), console=QUIET)
    layout: Any = load_assembled(tmp_path / "r").encoder.layout
    assert layout.grids == ((1, 2), (2, 1))
    stage["data"] = {"image": {"mode": "pad"}}
    with pytest.raises(DataError, match="own shape"):
        train(resolved(tiny, tmp_path / "s", **stage), console=QUIET)


def test_s2_trains_and_comes_back_from_the_original_layout(tiny: Path, tmp_path: Path) -> None:
    recipe = resolved(tiny, tmp_path / "r", tune={"connector": FULL}, train={"steps": 3})
    tree = recipe.recipe.model_dump(mode="json", exclude_none=True)
    tree["model"]["vision_tower"]["s2"] = [56, 112]
    changed = {name: tree[name] for name in ("model", "tune", "train")}
    train(resolved(tiny, tmp_path / "r", **changed), console=QUIET)
    found = load_assembled(tmp_path / "r")
    assert found.encoder.image_plan.size_px == 112
    assert found.encoder.grid.num_tokens(112, 112) == 16
    model: Any = found.model
    assert model.connector[0].in_features == 2 * model.config.vision_config.hidden_size
    out = export_model(tmp_path / "r", to="llava", output=tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["s2"] is True and values["s2_scales"] == "56,112"
    again = load_assembled(out)
    torch.testing.assert_close(
        logits(Assembled(again.model, found.encoder, out)), logits(found), atol=0, rtol=0
    )
    vistune = load_assembled(export_model(tmp_path / "r", to="vistune", output=tmp_path / "v"))
    assert answers(vistune) == answers(found)
    with pytest.raises(ModelError, match="2 scales"):
        export_model(tmp_path / "r", to="hf", output=tmp_path / "h")


def test_a_checkpoint_without_its_newline_is_refused(stages: Path, tmp_path: Path) -> None:
    out = export_model(stages / "two", to="hf", output=tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"image_newline"):
        load_assembled(out)
