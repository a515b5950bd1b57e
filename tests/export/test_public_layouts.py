"""The original LLaVA's and XTuner's layouts: written, read again, refused when they do not fit."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import parts, tokenizer, write_tower
from torch import Tensor
from trained_parts import LORA, logits, same, trained

from vistune.assembly import Origin, load_assembled
from vistune.errors import CheckpointError, ModelError, WeightsError
from vistune.export import export_model
from vistune.models.adapters import fold_adapter
from vistune.models.build import build_model
from vistune.models.facts import describe
from vistune.models.families.internlm2 import load_internlm2
from vistune.models.language.internlm2 import internlm2_keys
from vistune.recipe import ModelConfig

INTERNLM2 = Path(__file__).parents[1] / "fixtures" / "parity" / "internlm2"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def with_internlm2(shelf: Path) -> ModelConfig:
    folder = shelf / "internlm2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(INTERNLM2 / name, folder / name)
    tokenizer().save_pretrained(folder)
    tower = {"path": str(write_tower(shelf / "tower"))}
    return ModelConfig.model_validate(
        {"vision_tower": tower, "language_model": {"path": str(folder)}}
    )


def rebuilt(config: ModelConfig, **changes: dict[str, str]) -> list[Tensor]:
    tree = config.model_dump(mode="json")
    for role, keys in changes.items():
        tree[role] = tree[role] | keys
    changed = ModelConfig.model_validate(tree)
    return logits(build_model(changed, describe(changed), seed=99, dtype=torch.float32), changed)


def test_xtuner_adapters_there_and_back(shelf: Path, tmp_path: Path) -> None:
    config = parts(shelf)
    tune = {"language": LORA, "vision": LORA, "connector": {"mode": "full"}}
    expected = trained(config, tmp_path / "step", tune)
    out = export_model(tmp_path / "step", to="xtuner", output=tmp_path / "out")
    names = load_file(out / "projector" / "model.safetensors").keys()
    assert names == {f"model.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    tower = load_file(out / "visual_encoder_adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.vision_model.encoder.") for name in tower)
    found = rebuilt(
        config,
        connector={"weights": str(out / "projector")},
        language_model={"adapter": str(out / "llm_adapter")},
        vision_tower={"adapter": str(out / "visual_encoder_adapter")},
    )
    same(found, expected)


@pytest.mark.parametrize("language", [LORA | {"dora": True}, {"mode": "full"}])
def test_xtuner_with_a_whole_internlm2(
    with_internlm2: ModelConfig, tmp_path: Path, language: dict[str, Any]
) -> None:
    expected = trained(with_internlm2, tmp_path / "step", {"language": language})
    out = export_model(tmp_path / "step", to="xtuner", output=tmp_path / "out")
    assert not (out / "llm_adapter").exists()
    public = load_file(out / "model.safetensors").keys()
    assert public == load_file(INTERNLM2 / "model.safetensors").keys()
    found = rebuilt(
        with_internlm2,
        connector={"weights": str(out / "projector")},
        language_model={"path": str(out)},
    )
    same(found, expected)


@pytest.mark.parametrize("tune", [{}, {"targets": ["q_proj", "v_proj"], "layers": [1]}])
def test_xtuner_with_adapters_of_internlm2(
    with_internlm2: ModelConfig, tmp_path: Path, tune: dict[str, Any]
) -> None:
    expected = trained(with_internlm2, tmp_path / "step", {"language": LORA | tune})
    out = export_model(tmp_path / "step", to="xtuner", output=tmp_path / "out")
    assert not (out / "model.safetensors").exists()
    found = rebuilt(
        with_internlm2,
        connector={"weights": str(out / "projector")},
        language_model={"adapter": str(out / "llm_adapter")},
    )
    same(found, expected)
    named = Origin(template="vicuna_v1")
    again = export_model(out, to="vistune", output=tmp_path / "again", origin=named)
    same(logits(load_assembled(again).model, with_internlm2), expected)


def test_xtuner_adapters_of_internlm2_speak_of_its_own_names(
    with_internlm2: ModelConfig, tmp_path: Path
) -> None:
    language = with_internlm2.language_model
    assert language is not None
    public = load_file(INTERNLM2 / "model.safetensors")
    torch.manual_seed(2)
    pairs, expected = {}, dict(public)
    for name in ("model.layers.0.attention.wqkv", "model.layers.2.feed_forward.w2", "output"):
        rows, columns = public[f"{name}.weight"].shape
        first, second = torch.randn(2, columns), torch.randn(rows, 2)
        pairs[f"base_model.model.{name}.lora_A.weight"] = first
        pairs[f"base_model.model.{name}.lora_B.weight"] = second
        expected[f"{name}.weight"] = public[f"{name}.weight"] + 4.0 * second @ first
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = load_internlm2(Path(language.path), torch.float32)
    keys = internlm2_keys(model.config)
    assert fold_adapter(model, tmp_path, key="adapter", public=keys) == 5
    found = keys.to_public(model.state_dict(), where="test")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    rebuilt(with_internlm2, language_model={"adapter": str(tmp_path)})
    for change in ({"use_dora": True}, {"r": None}, {"modules_to_save": ["output"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ModelError, match="plain LoRA"):
            fold_adapter(model, tmp_path, key="adapter", public=keys)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="unexpected"):
        fold_adapter(model, tmp_path, key="adapter")
    pairs.popitem()
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="1 missing"):
        fold_adapter(model, tmp_path, key="adapter", public=keys)
    with pytest.raises(ModelError, match="no adapter"):
        fold_adapter(model, tmp_path / "nowhere", key="adapter")


@pytest.mark.parametrize(
    ("name", "prefix", "wrapper"),
    [
        ("mm_projector.bin", "model.mm_projector.", None),
        ("iter_2181.pth", "projector.model.", "state_dict"),
        ("connector.safetensors", "connector.", None),
    ],
)
def test_connectors_of_others(
    shelf: Path, tmp_path: Path, name: str, prefix: str, wrapper: str | None
) -> None:
    config = parts(shelf)
    made = build_model(config, describe(config), seed=7, dtype=torch.float32)
    state = {f"{prefix}{n}": t.clone() for n, t in made.connector.state_dict().items()}
    path = tmp_path / name

    def write(state: dict[str, Tensor]) -> None:
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state if wrapper is None else {wrapper: state, "meta": {"iter": 1}}, path)

    write(state)
    same(rebuilt(config, connector={"weights": str(path)}), logits(made, config))
    write({n: t for n, t in state.items() if not n.endswith("2.bias")})
    with pytest.raises(WeightsError, match=f"1 missing(.|\\n)*{prefix}2.bias"):
        rebuilt(config, connector={"weights": str(path)})
    write({**state, "llm.base_model.model.output.lora_A.default.weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="connector alone"):
        rebuilt(config, connector={"weights": str(path)})
    write({**state, f"{prefix}0.weight": torch.zeros(3, 3)})
    with pytest.raises(WeightsError, match=f"another shape(.|\\n)*{prefix}0.weight"):
        rebuilt(config, connector={"weights": str(path)})


class _Curve:
    """Stands for what a training framework leaves in its checkpoints."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)


def _leave_a_trace(folder: str) -> None:
    (Path(folder) / "was here").touch()


class _Trap:
    """Runs something when it is unpickled in the ordinary way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return _leave_a_trace, (str(self.folder),)


def test_other_objects_in_a_file_are_never_run(shelf: Path, tmp_path: Path) -> None:
    config, path = parts(shelf), tmp_path / "iter_1.pth"
    made = build_model(config, describe(config), seed=7, dtype=torch.float32)
    state = {f"projector.model.{n}": t for n, t in made.connector.state_dict().items()}
    hub = {"log_scalars": OrderedDict(loss=_Curve()), "trap": _Trap(tmp_path)}
    torch.save({"state_dict": state, "message_hub": hub, "meta": {"cfg": "x = 1"}}, path)
    same(rebuilt(config, connector={"weights": str(path)}), logits(made, config))
    assert not (tmp_path / "was here").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "was here").exists()
    torch.save({"state_dict": {"projector.model.0.weight": _Curve()}}, path)
    with pytest.raises(WeightsError, match="no weights by name"):
        rebuilt(config, connector={"weights": str(path)})
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(WeightsError):
        rebuilt(parts(shelf), connector={"weights": str(path)})
    with pytest.raises(WeightsError, match="no connector weights here"):
        rebuilt(parts(shelf), connector={"weights": str(tmp_path / "none")})


@pytest.mark.parametrize("vision", ["freeze", "full"])
def test_the_original_llava_there_and_back(shelf: Path, tmp_path: Path, vision: str) -> None:
    config = parts(shelf)
    tune = {"language": LORA, "vision": {"mode": vision}}
    expected = trained(config, tmp_path / "step", tune)
    out = export_model(tmp_path / "step", to="llava", output=tmp_path / "out")
    names = load_file(out / "model.safetensors").keys()
    assert any("vision_tower" in name for name in names) == (vision == "full")
    assert {n for n in names if "mm_projector" in n} == {
        f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")
    }
    settings = json.loads((out / "config.json").read_text())
    assert settings["mm_vision_select_layer"] == -2
    assert settings["architectures"] == ["LlavaLlamaForCausalLM"]
    again = load_assembled(out)
    found = logits(again.model, config)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Once more, from the directory itself: bit-equal files.
    twice = export_model(out, to="llava", output=tmp_path / "twice")
    first, second = (load_file(d / "model.safetensors") for d in (out, twice))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    (out / "vistune.json").unlink()
    same(logits(load_assembled_model(out), config), expected)


def load_assembled_model(folder: Path) -> Any:
    from vistune.checkpoint.layouts import describe_directory, load_directory

    return load_directory(folder, describe_directory(folder), dtype=torch.float32)


def test_models_these_layouts_have_no_place_for(shelf: Path, tmp_path: Path) -> None:
    trained(parts(shelf, text="qwen2"), tmp_path / "qwen", {})
    with pytest.raises(ModelError, match="original LLaVA"):
        export_model(tmp_path / "qwen", to="llava", output=tmp_path / "a")
    trained(parts(shelf), tmp_path / "tower", {"vision": {"mode": "full"}})
    with pytest.raises(ModelError, match="no place for a tower"):
        export_model(tmp_path / "tower", to="xtuner", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ModelError, match="no public layout"):
        export_model(tmp_path / "tower", to="native", output=tmp_path / "c")


def test_folded_adapters_are_not_lost(
    shelf: Path, with_internlm2: ModelConfig, tmp_path: Path
) -> None:
    config = parts(shelf)
    trained(config, tmp_path / "one", {"language": LORA, "vision": LORA})
    out = export_model(tmp_path / "one", to="xtuner", output=tmp_path / "out")
    tree = config.model_dump(mode="json")
    tree["language_model"] |= {"adapter": str(out / "llm_adapter")}
    second = ModelConfig.model_validate(tree)
    expected = trained(second, tmp_path / "two", {})
    again = export_model(tmp_path / "two", to="xtuner", output=tmp_path / "again")
    found = rebuilt(
        config,
        connector={"weights": str(again / "projector")},
        language_model={"path": str(again)},
    )
    same(found, expected)
    trained(second, tmp_path / "three", {"language": LORA})
    with pytest.raises(CheckpointError, match="folded in"):
        export_model(tmp_path / "three", to="adapter", output=tmp_path / "a")
    tree["vision_tower"] |= {"adapter": str(out / "visual_encoder_adapter")}
    trained(ModelConfig.model_validate(tree), tmp_path / "four", {})
    with pytest.raises(ModelError, match="would be lost"):
        export_model(tmp_path / "four", to="xtuner", output=tmp_path / "b")
