"""What other projects trained beside public models: found by its files, completed, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import parts, tokenizer
from torch import Tensor
from trained_parts import LORA, logits, same, trained

from vistune.assembly import build, draw, draw_directory, load_assembled
from vistune.data.template import TEMPLATES
from vistune.errors import CheckpointError, ModelError, VistuneError, WeightsError
from vistune.export import export_model
from vistune.models.build import build_model
from vistune.models.facts import describe
from vistune.recipe import ModelConfig, Recipe

TEMPLATE = "internlm2_chat"
TUNE: dict[str, Any] = {"language": LORA, "vision": LORA, "connector": {"mode": "full"}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    made = parts(tmp_path_factory.mktemp("parts"))
    assert made.language_model is not None
    with_marks = tokenizer()
    with_marks.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    with_marks.save_pretrained(made.language_model.path)
    return made


def drawn(model: dict[str, Any]) -> Any:
    """The blueprint of a recipe with this `model` section."""
    tree = {
        "name": "test",
        "run_dir": "runs/test",
        "model": model,
        "data": {"train": [{"path": "train.json"}], "template": TEMPLATE},
        "batch": {"samples": 1},
        "train": {"steps": 1},
    }
    return draw(Recipe.model_validate(tree))


def answered(model: dict[str, Any], config: ModelConfig) -> list[Tensor]:
    return logits(build(drawn(model), seed=99, dtype=torch.float32), config)


@pytest.fixture
def xtuner(config: ModelConfig, tmp_path: Path) -> tuple[Path, list[Tensor]]:
    """A directory as `convert pth_to_hf` writes it, and what the model in it answers."""
    expected = trained(config, tmp_path / "step", TUNE, template=TEMPLATES.get(TEMPLATE))
    out = export_model(tmp_path / "step", to="xtuner", output=tmp_path / "out")
    return out, expected


def test_an_xtuner_directory_is_enough(
    config: ModelConfig, xtuner: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    out, expected = xtuner
    assembled = load_assembled(out)
    same(logits(assembled.model, config), expected)
    assert assembled.encoder.template.name == TEMPLATE
    assert assembled.encoder.image_plan.mode == "pad"
    same(answered({"from_checkpoint": str(out)}, config), expected)
    # XTuner's `convert merge`: one directory with everything in it.
    merged = export_model(out, to="hf", output=tmp_path / "merged")
    same(logits(load_assembled(merged).model, config), expected)


def test_bases_of_the_recipe_go_first(
    config: ModelConfig, xtuner: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    out, expected = xtuner
    assert config.language_model is not None and config.vision_tower is not None
    moved = tmp_path / "moved"
    shutil.copytree(config.language_model.path, moved)
    for folder in ("llm_adapter", "visual_encoder_adapter"):
        file = out / folder / "adapter_config.json"
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": "/root/elsewhere"}
        file.write_text(json.dumps(settings))
    bare = {"from_checkpoint": str(out)}
    with pytest.raises(ModelError, match=r"/root/elsewhere(.|\n)*model\.bases\.vision_tower"):
        drawn(bare)
    bases = {"language_model": str(moved), "vision_tower": config.vision_tower.path}
    same(answered(bare | {"bases": bases}, config), expected)
    shutil.rmtree(out / "llm_adapter")
    shutil.rmtree(out / "visual_encoder_adapter")
    # XTuner's own config names the bases where no adapter does, and is read without being run.
    names = (out / "xtuner_config.py").read_text()
    assert config.language_model.path in names and TEMPLATE in names
    trap = f"open({str(tmp_path / 'was here')!r}, 'w')\nfrom nowhere import *\n"
    (out / "xtuner_config.py").write_text(trap + names)
    assert drawn(bare).parts.language_model.path == config.language_model.path
    assert not (tmp_path / "was here").exists()
    (out / "xtuner_config.py").write_text("llm_name_or_path = (")
    with pytest.raises(ModelError, match="config cannot be read"):
        drawn(bare)
    (out / "xtuner_config.py").unlink()
    with pytest.raises(ModelError, match="does not say which"):
        drawn(bare)


def test_a_whole_language_model_inside_stands_on_no_other(
    config: ModelConfig, tmp_path: Path
) -> None:
    tune = {"language": {"mode": "full"}, "connector": {"mode": "full"}}
    expected = trained(config, tmp_path / "step", tune, template=TEMPLATES.get(TEMPLATE))
    out = export_model(tmp_path / "step", to="xtuner", output=tmp_path / "out")
    bare = {"from_checkpoint": str(out)}
    same(answered(bare, config), expected)
    with pytest.raises(ModelError, match=r"leave model\.bases\.language_model out"):
        drawn(bare | {"bases": {"language_model": str(out)}})
    projector = out / "projector" / "model.safetensors"
    state = load_file(projector)
    save_file({**state, "model.4.weight": torch.zeros(2, 2)}, projector)
    with pytest.raises(WeightsError, match="1 unexpected"):
        answered(bare, config)
    settings = json.loads((out / "projector" / "config.json").read_text())
    (out / "projector" / "config.json").write_text(json.dumps(settings | {"bias": False}))
    with pytest.raises(ModelError, match="does not compose"):
        drawn(bare)


@pytest.mark.parametrize("form", ["file", "deepspeed"])
def test_a_projector_only_checkpoint(config: ModelConfig, tmp_path: Path, form: str) -> None:
    assert config.language_model is not None and config.vision_tower is not None
    made = build_model(config, describe(config), seed=7, dtype=torch.float32)
    expected = logits(made, config)
    state = {f"projector.model.{n}": t for n, t in made.connector.state_dict().items()}
    names = {
        "llm_name_or_path": config.language_model.path,
        "visual_encoder_name_or_path": config.vision_tower.path,
        "prompt_template": f"xtuner.utils.PROMPT_TEMPLATE.{TEMPLATE}",
    }
    text = "".join(f"{k} = {v!r}\n" for k, v in names.items()) + "model = dict(type=LLaVAModel)\n"
    path = tmp_path / "iter_2181.pth"
    file = path
    if form == "deepspeed":
        path.mkdir()
        file = path / "mp_rank_00_model_states.pt"
    wrapper = "state_dict" if form == "file" else "module"

    def write(state: dict[str, Tensor], cfg: str | None = text) -> None:
        torch.save({wrapper: state, "meta": {"cfg": cfg, "iter": 2181}}, file)

    write(state)
    assembled = load_assembled(path)
    same(logits(assembled.model, config), expected)
    assert assembled.encoder.template.name == TEMPLATE
    write(state, None)
    with pytest.raises(ModelError, match="does not say which"):
        load_assembled(path)
    bases = {
        "language_model": config.language_model.path,
        "vision_tower": config.vision_tower.path,
    }
    asked = {"from_checkpoint": str(path), "bases": bases}
    same(answered(asked, config), expected)
    bare = {n.replace("projector.model.", "model.mm_projector."): t for n, t in state.items()}
    torch.save(bare, tmp_path / "mm_projector.bin")
    one = {"from_checkpoint": str(tmp_path / "mm_projector.bin"), "bases": bases}
    same(answered(one, config), expected)
    with pytest.raises(ModelError, match="brings its own connector"):
        drawn(asked | {"connector": {"weights": str(path)}})
    write({**state, "llm.base_model.model.output.lora_A.default.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="connector alone"):
        drawn(asked)
    write({**state, "projector.model.0.weight": torch.zeros(3, 3)})
    with pytest.raises(WeightsError, match="another shape"):
        answered(asked, config)
    write({n: t for n, t in state.items() if not n.endswith("0.bias")})
    with pytest.raises(WeightsError, match="1 missing"):
        answered(asked, config)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(WeightsError, match="cannot be read"):
        drawn(asked)


def llava_pieces(config: ModelConfig, folder: Path, kind: str) -> list[Tensor]:
    """Writes what the original LLaVA leaves after a stage; returns what the model answers."""
    assert config.language_model is not None and config.vision_tower is not None
    facts = describe(config)
    folder.mkdir()
    values: dict[str, Any] = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": config.vision_tower.path,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "_name_or_path": config.language_model.path,
        "image_aspect_ratio": "square" if kind == "stage 1" else "pad",
    }
    (folder / "config.json").write_text(json.dumps(values))
    model = build_model(config, facts, seed=11, dtype=torch.float32)
    prefix = "model.mm_projector." if kind == "stage 1" else "base_model.model.model.mm_projector."
    state = {f"{prefix}{n}": t for n, t in model.connector.state_dict().items()}
    if kind == "stage 1":
        torch.save(state, folder / "mm_projector.bin")
        return logits(model, config)
    torch.save(state, folder / "non_lora_trainables.bin")
    layer = model.language_model.get_submodule("model.layers.1.mlp.up_proj")
    first, second = torch.randn(2, 32), torch.randn(layer.weight.shape[0], 2)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    pair = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    torch.save(pair, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
    settings["base_model_name_or_path"] = config.language_model.path
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        layer.weight += 3.0 * second @ first
    return logits(model, config)


@pytest.mark.parametrize("kind", ["stage 1", "lora"])
def test_pieces_of_the_original_llava(config: ModelConfig, tmp_path: Path, kind: str) -> None:
    expected = llava_pieces(config, tmp_path / "llava", kind)
    blueprint = draw_directory(tmp_path / "llava")
    same(logits(build(blueprint, seed=99, dtype=torch.float32), config), expected)
    assert blueprint.encoder.template.name == "vicuna_v1"
    assert blueprint.encoder.image_plan.mode == ("crop" if kind == "stage 1" else "pad")
    # With the weights of a whole model beside it, the same file is a copy of what is in them.
    (tmp_path / "llava" / "pytorch_model.bin").touch()
    (tmp_path / "llava" / "adapter_config.json").unlink(missing_ok=True)
    with pytest.raises(VistuneError):
        load_assembled(tmp_path / "llava")


def test_what_is_neither(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        draw_directory(tmp_path / "none")
    for name, content in (("model.bin", b""), ("iter_1.pth", b"nothing"), ("a.txt", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be read"):
            draw_directory(tmp_path / name)
    assert config.language_model is not None
    with pytest.raises(WeightsError, match="name a whole model by its directory"):
        draw_directory(Path(config.language_model.path) / "model.safetensors")
    trained(config, tmp_path / "step", {"connector": {"mode": "full"}})
    with pytest.raises(ModelError, match="has no effect"):
        drawn({"from_checkpoint": str(tmp_path / "step"), "connector": {"weights": "x.bin"}})
    with pytest.raises(ModelError, match="has no effect"):
        drawn({"from_checkpoint": str(tmp_path / "step"), "sat_qkv": "blocks"})
    with pytest.raises(ModelError, match="no local directory"):
        drawn({"from_checkpoint": str(tmp_path / "step"), "bases": {"vision_tower": "x"}})


def test_a_connector_takes_the_place_of_a_whole_models_own(
    config: ModelConfig, tmp_path: Path
) -> None:
    trained(config, tmp_path / "step", {"connector": {"mode": "full"}})
    whole = export_model(tmp_path / "step", to="vistune", output=tmp_path / "whole")
    other = build_model(config, describe(config), seed=12, dtype=torch.float32)
    saved = {f"model.mm_projector.{n}": t for n, t in other.connector.state_dict().items()}
    torch.save(saved, tmp_path / "mm_projector.bin")
    weights = {"weights": str(tmp_path / "mm_projector.bin")}
    found = answered({"from_checkpoint": str(whole), "connector": weights}, config)
    same(found, logits(other, config))
    (whole / "vistune.json").unlink()
    with pytest.raises(ModelError, match="stands on no other"):
        drawn({"from_checkpoint": str(whole), "bases": {"vision_tower": "x"}})
