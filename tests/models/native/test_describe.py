"""Directories of several ages, and what is wrong with one said in words."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import write_native

from vistune.assembly import load_assembled
from vistune.data.layout import PatchLayout
from vistune.errors import DataError, ModelError, VistuneError, WeightsError

WEIGHTS, IMAGES = "model.safetensors", "preprocessor_config.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_native("qwen2_5_vl", tmp_path_factory.mktemp("n") / "source")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def put(folder: Path, file: str, **changes: Any) -> None:
    values = json.loads((folder / file).read_text())
    values.update(changes)
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


OLD: dict[str, dict[str, Any]] = {
    "bounds at the top": {"min_pixels": 256, "max_pixels": 1024},
    "bounds under their old names": {
        "min_pixels": None,
        "max_pixels": None,
        "size": {"min_pixels": 256, "max_pixels": 1024},
    },
    "bounds at the top go before": {
        "min_pixels": 256,
        "max_pixels": 1024,
        "size": {"shortest_edge": 1, "longest_edge": 2},
    },
    "bounds as edges": {
        "min_pixels": None,
        "max_pixels": None,
        "size": {"shortest_edge": 256, "longest_edge": 1024},
    },
}


@pytest.mark.parametrize("name", OLD)
def test_image_processors_of_several_ages(folder: Path, name: str) -> None:
    put(folder, IMAGES, **OLD[name])
    layout = load_assembled(folder).encoder.layout
    assert isinstance(layout, PatchLayout)
    assert (layout.min_pixels, layout.max_pixels) == (256, 1024)
    # What is counted is what the public processor then does.
    size = layout.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (256, 1024)


def test_the_image_processor_may_lie_inside_of_the_processors_file(folder: Path) -> None:
    before = load_assembled(folder).encoder.to_state()
    values = json.loads((folder / IMAGES).read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    (folder / IMAGES).unlink()
    assert load_assembled(folder).encoder.to_state() == before


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "chat_template.json", "processor_config.json"]
)
def test_the_processors_template_goes_before_the_tokenizers(folder: Path, file: str) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    put(folder, "tokenizer_config.json", chat_template="{{ 'text alone' }}")
    written = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / file).write_text(written)
    assert load_assembled(folder).encoder.template.source == template  # type: ignore[attr-defined]


def test_weights_in_shards(folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    whole = load_assembled(folder).model.state_dict()
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_torch_state_dict(state, folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    found = load_assembled(folder).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(VistuneError):
        load_assembled(folder)


def test_the_names_of_today_load_too(folder: Path) -> None:
    whole = load_assembled(folder).model.state_dict()

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            new = f"model.{name}" if name.startswith("visual.") else name
            new = new.replace("model.", "model.language_model.", 1) if new == name else new
            state[new] = state.pop(name)

    weights(folder, rename)
    assert "model.visual.patch_embed.proj.weight" in load_file(folder / WEIGHTS)
    found = load_assembled(folder).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


WRONG_WEIGHTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing: model.visual.blocks.0.attn.qkv.weight": lambda state: state.pop(
        "visual.blocks.0.attn.qkv.weight"
    ),
    "unexpected: model.visual.blocks.9.attn.qkv.weight": lambda state: state.update(
        {"visual.blocks.9.attn.qkv.weight": torch.zeros(2, 2)}
    ),
    "of another shape: model.language_model.norm.weight": lambda state: state.update(
        {"model.norm.weight": torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("said", WRONG_WEIGHTS)
def test_every_weight_is_accounted_for(folder: Path, said: str) -> None:
    weights(folder, WRONG_WEIGHTS[said])
    with pytest.raises(WeightsError, match=said):
        load_assembled(folder)


def remove(*names: str) -> Callable[[Path], None]:
    def go(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return go


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def change(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder, file, **values)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "broken config": (write("config.json", "{"), "config.json: this file cannot be read"),
    "unknown model": (change("config.json", model_type="qwen9_vl"), "qwen2_5_vl, qwen2_vl"),
    "broken processor": (write(IMAGES, "{"), f"{IMAGES}: this file cannot be read"),
    "no processor": (remove(IMAGES), "no file of an image processor"),
    "no bounds": (
        change(IMAGES, min_pixels=None, size="huge"),
        "does not say how large images may be",
    ),
    "other patches": (change(IMAGES, patch_size=None), "disagree on the patches"),
    "no Pillow form": (
        change(IMAGES, image_processor_type="Sam2ImageProcessorFast"),
        "no image processor Sam2ImageProcessor that works without torchvision",
    ),
    "mean in words": (change(IMAGES, image_mean="x"), "one number for each of three channels"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "broken tokenizer": (write("tokenizer.json", "{"), "its files cannot be read"),
    "no template": (remove("chat_template.jinja"), "no chat template of its own"),
    "another tokenizer": (change("config.json", image_token_id=7), "disagree on the id"),
    "no weights": (remove(WEIGHTS), "its files cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(folder: Path, name: str) -> None:
    damage, said = WRONG[name]
    damage(folder)
    with pytest.raises((ModelError, DataError), match=said):
        load_assembled(folder)
