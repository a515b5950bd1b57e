"""An MGM from Gemma, CLIP and OpenCLIP's ConvNeXt, and MGM's mm_projector.bin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_dirs import write_mgm_parts, write_pictures
from rich.console import Console
from torch import Tensor

from vistune.assembly import build, draw, load_assembled
from vistune.checkpoint.run_dir import RunDirectory
from vistune.errors import ModelError, WeightsError
from vistune.export import export_model
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MGM, and the four things it is made of, each as it is published."""
    root = tmp_path_factory.mktemp("mgm")
    write_pictures(root / "pictures")
    write_mgm_parts(root)
    return root


def section(shelf: Path, *, aux: bool = True, weights: str | None = None) -> dict[str, Any]:
    return {
        "vision_tower": {"path": str(shelf / "clip")},
        "vision_tower_aux": {"path": str(shelf / "aux") if aux else None, "size_px": 64},
        "language_model": {"path": str(shelf / "gemma")},
        "connector": {"weights": weights},
    }


def recipe(shelf: Path, model: dict[str, Any], run_dir: Path, **train: Any) -> Recipe:
    source = {"path": str(shelf / "pictures/train.json"), "images": str(shelf / "pictures")}
    tree = {
        "name": "mgm",
        "run_dir": str(run_dir),
        "device": "cpu",
        "dtype": "fp32",
        "model": model,
        "data": {"train": [source], "workers": 0},
        "batch": {"samples": 2, "max_tokens": 512},
        "train": {"steps": 2, "schedule": "constant", "warmup_frac": 0.0, **train},
        "log": {"tensorboard": False, "progress": False},
    }
    return Recipe.model_validate(tree)


def built(shelf: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    made = build(draw(recipe(shelf, model, shelf / "run")), seed=0, dtype=torch.float32)
    assert isinstance(made, MGMForConditionalGeneration)
    return made.state_dict()


def public(shelf: Path) -> dict[str, Tensor]:
    return load_assembled(shelf / "whole").model.state_dict()


@pytest.mark.parametrize("aux", [True, False])
def test_parts_and_mm_projector_are_the_whole(shelf: Path, aux: bool) -> None:
    weights = str(shelf / "mm_projector.bin")
    found, expected = built(shelf, section(shelf, aux=aux, weights=weights)), public(shelf)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_it_the_connector_is_drawn_and_nothing_else(shelf: Path) -> None:
    found, expected = built(shelf, section(shelf)), public(shelf)
    same = {name for name in expected if torch.equal(found[name], expected[name])}
    norms = {n for n in expected if n.startswith("connector.mining.") and ".0." in n}
    assert expected.keys() - same == {n for n in expected if n.startswith("connector.")} - norms
    again = built(shelf, section(shelf))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_what_of_the_file_is_missing_or_too_much_is_named(shelf: Path, tmp_path: Path) -> None:
    file = tmp_path / "mm_projector.bin"
    state = torch.load(shelf / "mm_projector.bin", weights_only=True)
    asked = section(shelf, weights=str(file))

    def write(changed: dict[str, Tensor]) -> None:
        torch.save(changed, file)

    write({n: t for n, t in state.items() if "vision_tower" not in n})
    assert built(shelf, asked).keys() == public(shelf).keys()
    write({n: t for n, t in state.items() if n != "model.vlm_uni_val_projector.1.bias"})
    with pytest.raises(WeightsError, match=r"1 tensors are missing(.|\n)*vlm_uni_val"):
        built(shelf, asked)
    write({n: t for n, t in state.items() if "vision_stem.0.weight" not in n})
    with pytest.raises(WeightsError, match="1 tensors are missing"):
        built(shelf, asked)
    write({**state, "model.vision_fpn.0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"1 are left over(.|\n)*vision_fpn"):
        built(shelf, asked)
    write({**state, "model.mm_projector.0.bias": torch.zeros(3)})
    with pytest.raises(WeightsError, match="another shape"):
        built(shelf, asked)
    with pytest.raises(ModelError, match="no high-resolution tower"):
        built(shelf, section(shelf, aux=False))


def test_it_takes_the_place_of_a_whole_models_own(shelf: Path, tmp_path: Path) -> None:
    state = torch.load(shelf / "mm_projector.bin", weights_only=True)
    changed = {n: t + 1 if "mm_projector" in n else t for n, t in state.items()}
    torch.save(changed, tmp_path / "mm_projector.bin")
    weights = {"weights": str(tmp_path / "mm_projector.bin")}
    found = built(shelf, {"from_checkpoint": str(shelf / "whole"), "connector": weights})
    expected = public(shelf)
    moved = {name for name in found if not torch.equal(found[name], expected[name])}
    assert moved == {n for n in found if n.startswith("connector.projector.")}
    changed["model.mm_projector.0.bias"] = torch.zeros(3)
    torch.save(changed, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="another shape"):
        built(shelf, {"from_checkpoint": str(shelf / "whole"), "connector": weights})


def test_what_mgms_first_stage_leaves_is_enough(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "MGM-2B-Pretrain"
    folder.mkdir()
    shutil.copy(shelf / "mm_projector.bin", folder)
    values = {
        **json.loads((shelf / "gemma" / "config.json").read_text()),
        "architectures": ["MGMGemmaForCausalLM"],
        "model_type": "mgm_gemma",
        "_name_or_path": str(shelf / "gemma"),
        "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
        "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_size_aux": 64,
        "image_aspect_ratio": "square",
    }
    (folder / "config.json").write_text(json.dumps(values))
    asked = {"from_checkpoint": str(folder), "bases": {"vision_tower": str(shelf / "clip")}}
    with pytest.raises(ModelError, match=r"model_zoo(.|\n)*model\.bases\.vision_tower"):
        built(shelf, {"from_checkpoint": str(folder)})
    found, expected = built(shelf, asked), public(shelf)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    encoder = draw(recipe(shelf, asked, tmp_path / "run")).encoder
    assert (encoder.template.name, encoder.image_plan.mode) == ("gemma", "crop")


def test_other_parts_are_no_mgm(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Gemma and CLIP"):
        other = tmp_path / "llama"
        shutil.copytree(shelf / "gemma", other)
        values = json.loads((other / "config.json").read_text()) | {"model_type": "llama"}
        (other / "config.json").write_text(json.dumps(values))
        built(shelf, {**section(shelf), "language_model": {"path": str(other)}})
    with pytest.raises(ModelError, match="no OpenCLIP weights"):
        aux = {"path": str(shelf / "clip" / "nothing")}
        built(shelf, {**section(shelf), "vision_tower_aux": aux})
    with pytest.raises(ModelError, match="does not take this"):
        tower = {"path": str(shelf / "clip"), "adapter": "x"}
        built(shelf, {**section(shelf), "vision_tower": tower})


def test_both_stages_from_parts(shelf: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)

    def run(name: str, model: dict[str, Any], tune: dict[str, Any], **more: Any) -> Any:
        made = recipe(shelf, model, tmp_path / name, **more)
        made = made.model_copy(
            update={"tune": type(made.tune).model_validate(tune)},
        )
        return ResolvedRecipe(recipe=made, sources={}, origin="test")

    first = {"connector": {"mode": "full"}}
    train(run("one", section(shelf), first, steps=1), console=quiet)
    train(run("one", section(shelf), first), resume=True, console=quiet)
    train(run("whole", section(shelf), first), console=quiet)
    ours, theirs = (RunDirectory(tmp_path / n).metrics.read_text() for n in ("one", "whole"))
    losses = [[json.loads(line)["loss"] for line in t.splitlines()] for t in (ours, theirs)]
    assert losses[0] == losses[1]
    second = {"connector": {"mode": "full"}, "language": {"mode": "full"}}
    one = {"from_checkpoint": str(tmp_path / "one")}
    train(run("two", one, second), console=quiet)
    trained = load_assembled(tmp_path / "two").model.state_dict()
    written = export_model(tmp_path / "two", to="native", output=tmp_path / "native")
    again = load_assembled(written).model.state_dict()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
