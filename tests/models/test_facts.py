from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import (
    PREPROCESSOR,
    SIZE_PX,
    VISION_KINDS,
    VOCAB,
    parts,
    text_config,
    tokenizer,
    vision_model,
    write_language,
)
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, SiglipConfig, SiglipModel

from vistune.errors import MissingExtraError, ModelError, VistuneError
from vistune.models.build import build_model
from vistune.models.facts import (
    describe,
    image_token_of,
    parse_image_defaults,
    read_image_defaults,
    read_text_config,
    read_vision_config,
)
from vistune.models.towers.families import plan_tower, tower_grid
from vistune.recipe import LanguageModelConfig, ModelConfig, VisionTowerConfig
from vistune.types import VisionGrid


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


GRIDS = {
    "clip": VisionGrid(14, 0, 1, SIZE_PX),
    "siglip": VisionGrid(14, 0, 1, SIZE_PX),
    "siglip2": VisionGrid(14, 0, 1, None),
    "dinov2": VisionGrid(14, 0, 1, None),
    "dinov2_registers": VisionGrid(14, 0, 1, None),
    "dinov3": VisionGrid(14, 0, 1, None),
    "vit": VisionGrid(14, 0, 1, SIZE_PX),
    "convnext": VisionGrid(16, 0, 1, None),
    "convnextv2": VisionGrid(16, 0, 1, None),
    "dinov3_convnext": VisionGrid(16, 0, 1, None),
}


@pytest.mark.parametrize("vision", VISION_KINDS)
def test_grid_counts_what_the_tower_makes(shelf: Path, vision: str) -> None:
    config = parts(shelf, vision=vision)
    facts = describe(config)
    assert facts.grid == GRIDS[vision]
    model = build_model(config, facts, seed=0, dtype=torch.float32)
    sizes = [(SIZE_PX, SIZE_PX)]
    if facts.grid.fixed_size_px is None:
        sizes += [(56, 84), (112, 56)]
    for height, width in sizes:
        found = model.image_features(torch.randn(2, 3, height, width))
        assert found.shape[1] == facts.grid.num_tokens(height, width)


def test_code_in_a_directory_is_neither_run_nor_asked_about(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def answer(*question: object) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    trap = f"open({str(tmp_path / 'was run')!r}, 'w')\n"
    base = parts(shelf).language_model
    assert base is not None
    for what, file in (("tokenizer", "tokenizer_config.json"), ("config", "config.json")):
        folder = tmp_path / what
        shutil.copytree(base.path, folder)
        settings = json.loads((folder / file).read_text())
        settings |= {"model_type": "of_its_own", "tokenizer_class": "OwnTokenizer"}
        key = "AutoConfig" if what == "config" else "AutoTokenizer"
        name = "own_code.Own" if what == "config" else ["own_code.OwnTokenizer", None]
        (folder / file).write_text(json.dumps(settings | {"auto_map": {key: name}}))
        (folder / "own_code.py").write_text(trap)
        tree = parts(shelf).model_dump(mode="json")
        tree["language_model"]["path"] = str(folder)
        with pytest.raises(ModelError, match=what):
            describe(ModelConfig.model_validate(tree))
    assert not asked and not (tmp_path / "was run").exists()


def test_a_config_that_transformers_refuses_is_named(shelf: Path, tmp_path: Path) -> None:
    tower = parts(shelf, vision="clip").vision_tower
    assert tower is not None
    shutil.copytree(tower.path, tmp_path / "tower")
    file = tmp_path / "tower" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 7}))
    with pytest.raises(ModelError, match=r"tower(.|\n)*multiple"):
        read_vision_config(VisionTowerConfig(path=str(tmp_path / "tower")))


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("vision", ["clip", "siglip", "vit", "dinov2"])
def test_layer_is_an_index_into_hidden_states(shelf: Path, vision: str, layer: int) -> None:
    config = parts(shelf, vision=vision, tower={"layer": layer}, connector={"kind": "linear"})
    facts = describe(config)
    model = build_model(config, facts, seed=0, dtype=torch.float32)
    model.connector = torch.nn.Identity()
    pixels = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    whole = vision_model(vision)
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    expected = states[layer][:, facts.tower.num_prefix :]
    torch.testing.assert_close(model.image_features(pixels), expected)
    kept = layer if layer >= 0 else 4 + layer
    names = {n.split(".")[2] for n, _ in model.vision_tower.named_parameters() if ".layer" in n}
    assert len([n for n in names if n.isdigit()]) == kept or vision == "vit"


@pytest.mark.parametrize("vision", ["siglip", "vit", "dinov2", "dinov3"])
def test_auto_is_the_normalised_output(shelf: Path, vision: str) -> None:
    config = parts(shelf, vision=vision)
    facts = describe(config)
    model = build_model(config, facts, seed=0, dtype=torch.float32)
    model.connector = torch.nn.Identity()
    pixels = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    with torch.no_grad():
        expected = vision_model(vision)(pixels).last_hidden_state[:, facts.tower.num_prefix :]
    torch.testing.assert_close(model.image_features(pixels), expected)


def test_convnext_stage_is_a_layer(shelf: Path) -> None:
    facts = describe(parts(shelf, vision="convnext", tower={"layer": -2}))
    assert facts.grid.patch_px == 8 and len(facts.vision_config.depths) == 2


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_part_of_a_two_tower_model(shelf: Path, tmp_path: Path, kind: str) -> None:
    config = parts(shelf, vision=kind)
    tower = vision_model(kind)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    if kind == "clip":
        both = CLIPModel(
            CLIPConfig(
                vision_config=tower.config.to_dict(),
                text_config=CLIPTextConfig(num_attention_heads=2, eos_token_id=2, **text).to_dict(),
            )
        )
    else:
        both = SiglipModel(
            SiglipConfig(
                vision_config=tower.config.to_dict(), text_config={"num_attention_heads": 2, **text}
            )
        )
    both.vision_model.load_state_dict(tower.state_dict())
    folder = tmp_path / "both"
    both.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    whole = ModelConfig.model_validate(
        config.model_dump() | {"vision_tower": {"path": str(folder)}}
    )
    pixels = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    found = [
        build_model(c, describe(c), seed=0, dtype=torch.float32).image_features(pixels)
        for c in (config, whole)
    ]
    assert torch.equal(*found)


def test_image_token_is_added_once() -> None:
    bare, has = tokenizer(), tokenizer(image_token=True)
    assert image_token_of(bare) == len(bare) - 1 == 259
    assert bare.convert_ids_to_tokens(259) == "<image>" and bare.added_tokens_decoder[259].special
    assert bare.encode("a<image>b", add_special_tokens=False)[1] == 259
    assert image_token_of(bare) == 259
    assert image_token_of(has) == 259 and len(has) == 260


OLD = {"crop_size": 224, "size": 224}
NEW = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
NO_CROP = {"do_center_crop": False, "size": {"height": 384, "width": 384}, "resample": 2}
SIGLIP = {"size": {"height": 384, "width": 384}, "resample": 2}
CONVNEXT = {"do_center_crop": False, "size": {"shortest_edge": 256}, "crop_pct": 0.875}


@pytest.mark.parametrize(
    ("values", "size_px", "resample"),
    [
        (OLD, 224, "bicubic"),
        (NEW, 224, "bicubic"),
        (NO_CROP, 384, "bilinear"),
        (SIGLIP, 384, "bilinear"),
        (CONVNEXT, 256, "bicubic"),
    ],
)
def test_preprocessor_spellings(values: dict[str, Any], size_px: int, resample: str) -> None:
    found = parse_image_defaults(
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **values}, where="file"
    )
    assert (found.size_px, found.resample) == (size_px, resample)
    assert found.mean == (0.5, 0.5, 0.5) and found.std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": None, "crop_size": None}, "size"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [1.0]}, "image_std"),
        ({"rescale_factor": 0.5}, "rescale_factor"),
        ({"resample": 9}, "resample"),
    ],
)
def test_unusable_preprocessor_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=f"got: .*{named}="):
        parse_image_defaults(PREPROCESSOR | change, where="file")


def test_without_normalisation() -> None:
    found = parse_image_defaults(PREPROCESSOR | {"do_normalize": False}, where="file")
    assert found.mean == (0.0, 0.0, 0.0) and found.std == (1.0, 1.0, 1.0)


def test_preprocessor_inside_processor_config(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    assert read_image_defaults(str(tmp_path), None).size_px == SIZE_PX
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        read_image_defaults(str(tmp_path.parent), None)


def broken(shelf: Path, tmp_path: Path, part: str) -> tuple[ModelConfig, Path]:
    """A copy of the parts to break one of."""
    config = parts(shelf)
    source = config.vision_tower if part == "vision_tower" else config.language_model
    assert source is not None
    folder = tmp_path / part
    shutil.copytree(source.path, folder)
    values = config.model_dump() | {part: {"path": str(folder)}}
    return ModelConfig.model_validate(values), folder


def message(config: ModelConfig) -> str:
    with pytest.raises(VistuneError) as caught:
        describe(config)
    return str(caught.value)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_wrong_directories(shelf: Path, tmp_path: Path, part: str) -> None:
    config, folder = broken(shelf, tmp_path, part)
    (folder / "config.json").write_text("{not json")
    assert "config.json" in message(config) or "cannot be read" in message(config)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert str(folder) in message(config)
    (folder / "config.json").unlink()
    assert "no config.json" in message(config)
    shutil.rmtree(folder)
    assert "no such directory" in message(config) and f"model.{part}.path" in message(config)
    folder.write_text("a file")
    assert "a file, not a directory" in message(config)


def test_misspelt_directory_is_not_looked_for_on_the_hub(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        read_text_config(LanguageModelConfig(path="parts/lama"))


def test_parts_in_each_others_place(shelf: Path) -> None:
    config = parts(shelf)
    assert config.vision_tower is not None and config.language_model is not None
    with pytest.raises(ModelError, match="no causal language model"):
        read_text_config(LanguageModelConfig(path=config.vision_tower.path))
    swapped = VisionTowerConfig(path=config.language_model.path)
    with pytest.raises(ModelError, match="'llama' is not a vision tower"):
        plan_tower(read_vision_config(swapped), layer="auto", select="patch", where="x")


def test_missing_tokenizer_and_preprocessor(shelf: Path, tmp_path: Path) -> None:
    config, folder = broken(shelf, tmp_path, "vision_tower")
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in message(config)
    config, folder = broken(shelf, tmp_path, "language_model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert str(folder) in message(config)


@pytest.mark.parametrize("layer", [-5, 4, 99])
def test_layer_out_of_range(shelf: Path, layer: int) -> None:
    said = message(parts(shelf, tower={"layer": layer}))
    assert "3 layers" in said and "-4 to 3, or auto" in said


def test_settings_that_do_not_fit_the_tower(shelf: Path) -> None:
    assert "no class token" in message(parts(shelf, vision="siglip", tower={"select": "cls_patch"}))
    assert "only its last features" in message(
        parts(shelf, vision="dinov3_convnext", tower={"layer": -2})
    )
    assert "do not fold" in message(parts(shelf, connector={"pixel_shuffle": 3}))
    assert "cannot be folded" in message(
        parts(shelf, tower={"select": "cls_patch"}, connector={"pixel_shuffle": 2})
    )
    tall = type(vision_model("clip").config)(image_size=[28, 42])
    with pytest.raises(ModelError, match="not square"):
        tower_grid(tall, describe(parts(shelf)).tower, pixel_shuffle=1, where="x")


def test_timm_without_its_package(tmp_path: Path) -> None:
    values = {"architecture": "resnet18", "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(MissingExtraError, match=r"vistune\[timm\]"):
        read_vision_config(VisionTowerConfig(path=str(tmp_path)))


def test_gguf_file_that_is_not_there(shelf: Path) -> None:
    config = parts(shelf)
    assert config.language_model is not None
    with pytest.raises(ModelError, match=r"no file 'x\.gguf'"):
        read_text_config(LanguageModelConfig(path=config.language_model.path, gguf_file="x.gguf"))


def test_decoders_that_mix_samples_are_refused(tmp_path: Path, shelf: Path) -> None:
    write_language(tmp_path / "lm")
    config = ModelConfig.model_validate(
        parts(shelf).model_dump() | {"language_model": {"path": str(tmp_path / "lm")}}
    )
    facts = describe(config)
    facts.text_config.layer_types = ["full_attention", "conv"]
    with pytest.raises(ModelError, match="leak between the samples"):
        build_model(config, facts, seed=0, dtype=torch.float32)
    assert text_config().vocab_size == VOCAB
