"""Encoders are written whole: a public directory comes back with every bit it had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from family_dirs import PARITY, write_family
from safetensors.torch import load_file, save_file
from tiny_parts import PREPROCESSOR, text_config, tokenizer, vision_model
from torch import Tensor

from vistune.assembly import Origin, load_assembled
from vistune.checkpoint.layouts import llava_hf
from vistune.errors import ModelError
from vistune.export import export_model
from vistune.recipe import BasesConfig


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_transformers_llava_comes_back_bit_equal(tmp_path: Path, kind: str, vision: str) -> None:
    grids = {"image_grid_pinpoints": [[56, 112], [112, 56]]} if kind == "LlavaNext" else {}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision_model(vision).config,
        text_config=text_config("llama"),
        image_token_index=259,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        **grids,
    )
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).half()
    with torch.no_grad():  # norms that say something, the one that nothing passes among them
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = tmp_path / "any name"
    theirs.save_pretrained(source)
    tokenizer(image_token=True).save_pretrained(source)
    (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    out = export_model(source, to="hf", output=tmp_path / "out")
    read = [
        {llava_hf.to_composed(n): t for n, t in load_file(d / "model.safetensors").items()}
        for d in (out, source)
    ]
    same_bits(*read)
    again = type(theirs).from_pretrained(out, dtype=torch.float16)
    assert again.config.vision_feature_layer == -2
    same_bits(dict(again.state_dict()), dict(theirs.state_dict()))
    # Once more: also the names in the file.
    twice = export_model(out, to="hf", output=tmp_path / "twice")
    same_bits(*(load_file(d / "model.safetensors") for d in (twice, out)))


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-1.6"])
@pytest.mark.parametrize("said", [True, False])
def test_the_original_llava_comes_back_bit_equal(tmp_path: Path, kind: str, said: bool) -> None:
    source = write_family(kind, tmp_path / "any name")
    state = {n: t.half() for n, t in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors")
    file = source / "config.json"
    settings = json.loads(file.read_text()) | ({"torch_dtype": "float16"} if said else {})
    file.write_text(json.dumps(settings))
    out = export_model(source, to="llava", output=tmp_path / "out")
    # 1.6 holds its tower, with the layer that nothing passes; 1.5 names it.
    assert any("vision_tower" in name for name in state) == (kind == "llava-1.6")
    same_bits(load_file(out / "model.safetensors"), state)
    written = json.loads((out / "config.json").read_text())
    assert (written["mm_vision_select_layer"], written["torch_dtype"]) == (-2, "float16")
    # The same model as transformers' class has the whole encoder too.
    hf = export_model(source, to="hf", output=tmp_path / "hf")
    names = load_file(hf / "model.safetensors").keys()
    assert {n for n in names if "encoder.layers.2." in n or "post_layernorm" in n}
    assert json.loads((hf / "config.json").read_text())["vision_feature_layer"] == -2
    assert type(load_assembled(hf).model).__name__ == "ComposedVLM"


def test_the_sentencepiece_file_goes_along(tmp_path: Path) -> None:
    source = write_family("llava-1.5", tmp_path / "any name")
    for made in (*source.glob("tokenizer*"), *source.glob("special*")):
        made.unlink()
    # Released as a sentencepiece file, which the original code reads again.
    shutil.copy(PARITY / "tokenizers" / "llama_like" / "tokenizer.model", source)
    token = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (source / "tokenizer_config.json").write_text(json.dumps(token))
    out = export_model(source, to="llava", output=tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    coders = [load_assembled(folder).encoder for folder in (source, out)]
    first, second = (coder.tokenizer.encode("Is it?\nA  cat.") for coder in coders)
    assert first == second and coders[0].tokenizer.convert_ids_to_tokens(first)[1] == "▁I"


def test_from_transformers_to_the_original_and_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.LlavaConfig(
        vision_config=vision_model("clip").config,
        text_config=text_config("llama"),
        image_token_index=259,
        vision_feature_layer=-2,
    )
    theirs = transformers.LlavaForConditionalGeneration(config).bfloat16()
    source, encoder = tmp_path / "hf", tmp_path / "encoder"
    theirs.save_pretrained(source)
    tokenizer(image_token=True).save_pretrained(source)
    vision_model("clip").save_pretrained(encoder)
    for folder in (source, encoder):
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    with pytest.raises(ModelError, match="--vision-tower"):
        export_model(source, to="llava", output=tmp_path / "llava")
    named = Origin(bases=BasesConfig(vision_tower=str(encoder)))
    out = export_model(source, to="llava", output=tmp_path / "llava", origin=named)
    settings = json.loads((out / "config.json").read_text())
    assert (settings["mm_vision_tower"], settings["mm_vision_select_layer"]) == (str(encoder), -2)
    again = export_model(out, to="hf", output=tmp_path / "again")
    found, expected = (
        {llava_hf.to_composed(n): t for n, t in load_file(d / "model.safetensors").items()}
        for d in (again, source)
    )
    same_bits(found, expected)
    # Vistune's own directory holds of the encoder what the model uses of it.
    whole = export_model(source, to="vistune", output=tmp_path / "whole")
    cut = export_model(whole, to="llava", output=tmp_path / "cut", origin=named)
    of_cut, of_whole = (load_file(d / "model.safetensors") for d in (cut, out))
    assert of_cut.keys() < of_whole.keys()
    assert all(torch.equal(of_whole[name], tensor) for name, tensor in of_cut.items())
