"""Frozen weights in 8 and 4 bits: which layers, how near, and adapters beside them."""

import sys

import pytest
import torch
from tiny_parts import SIZE_PX, composed, row, write_language, write_tower
from torch import nn

from vistune.errors import MissingExtraError, ModelError
from vistune.models.fused.trunk import why_not_fusable
from vistune.models.tune import apply_tuning, trainable_state
from vistune.models.tune.quantize import quantize_frozen
from vistune.recipe import TuneConfig

LORA = TuneConfig.model_validate({"language": {"mode": "lora", "rank": 4}})
CPU = torch.device("cpu")


def wide(tmp_path, text="llama"):
    """A model whose layers read multiples of 64 numbers, as real ones do."""
    if not (tmp_path / f"text_{text}").exists():
        write_language(tmp_path / f"text_{text}", text, hidden_size=64, intermediate_size=128)
    return composed(tmp_path, text=text)


def quantized(tmp_path, frozen_format, tune=LORA, text="llama"):
    model, facts = wide(tmp_path, text)
    apply_tuning(model, tune, seed=0)
    state = trainable_state(model)
    count = quantize_frozen(model, "language", frozen_format, dtype=torch.float32, device=CPU)
    return model, facts, count, state


@pytest.mark.parametrize("text", ["llama", "llama_tied"])
@pytest.mark.parametrize("frozen_format", ["int8", "nf4"])
def test_exactly_the_frozen_layers_of_the_role_are_held_compactly(tmp_path, frozen_format, text):
    bnb = pytest.importorskip("bitsandbytes")
    model, _, count, before = quantized(tmp_path, frozen_format, text=text)
    kind = {"int8": bnb.nn.Linear8bitLt, "nf4": bnb.nn.Linear4bit}[frozen_format]
    compact = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert count == len(compact) == 2 * 7  # two layers of seven projections
    assert all(model.module_map.role_of(name) == "language" for name in compact)
    assert all(".base_layer" in name for name in compact)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert why_not_fusable(model.language_model.base_model).startswith("weights are held as")
    assert trainable_state(model).keys() == before.keys()


# Normal weights rounded to 16 levels in blocks are off by about 0.09 of their norm, to 8 bits with
# a scale per row (and inputs too) by about 0.01.
@pytest.mark.parametrize(("frozen_format", "near"), [("int8", 0.03), ("nf4", 0.15)])
def test_products_stay_near_and_adapters_get_gradients(tmp_path, frozen_format, near):
    pytest.importorskip("bitsandbytes")
    plain, facts = wide(tmp_path)
    model, _, _, _ = quantized(tmp_path, frozen_format)
    name = "language_model.model.layers.0.mlp.up_proj"
    model.train()  # in evaluation, the package's CPU kernel wants widths that are multiples of 32
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, found = (m.get_submodule(name)(x) for m in (plain, model))
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < near
    model.hidden_states(**row(facts).packed).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert any("lora_B" in n and float(g.abs().sum()) > 0 for n, g in grads.items())


def test_a_role_that_trains_whole_has_nothing_to_hold(tmp_path):
    pytest.importorskip("bitsandbytes")
    full = TuneConfig.model_validate({"language": {"mode": "full"}})
    with pytest.raises(ModelError, match="no frozen linear layer"):
        quantized(tmp_path, "nf4", tune=full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_come_out_wrong_are_refused(tmp_path, dtype):
    """The package's CPU code (0.50) mixes up blocks of rows that are not whole blocks."""
    pytest.importorskip("bitsandbytes")
    model, _ = composed(tmp_path)
    # Weights of one size hide it: every block then has about the same largest number.
    for parameter in model.language_model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    apply_tuning(model, LORA, seed=0)
    with pytest.raises(ModelError, match="does not round rows of 32 numbers"):
        quantize_frozen(model, "language", "nf4", dtype=dtype, device=CPU)
    # Nothing was replaced: the other forms can still be chosen.
    assert quantize_frozen(model, "language", "int8", dtype=dtype, device=CPU) == 2 * 7


def test_numbers_come_back_as_the_nearest_of_sixteen_levels(tmp_path):
    """Block by block, against the levels themselves."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain, _ = wide(tmp_path)
    model, _, _, _ = quantized(tmp_path, "nf4")
    name = "language_model.model.layers.1.mlp.down_proj"
    held = model.get_submodule(f"{name}.base_layer").weight
    back = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    blocks = plain.get_parameter(f"{name}.weight").detach().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    # Half of the widest gap between levels (0.70 to 1), and the scales' own 8 bits.
    assert ((back.reshape(-1, 64) - blocks).abs() <= (0.152 + 0.02) * largest).all()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"vistune\[qlora\]"):
        quantized(tmp_path, "nf4")


@pytest.mark.parametrize(("frozen_format", "near"), [("int8", 0.03), ("nf4", 0.2)])
@pytest.mark.parametrize("tune", ["freeze", "lora"])
def test_a_tower_is_held_compactly_by_its_own_role(tmp_path, frozen_format, near, tune):
    bnb = pytest.importorskip("bitsandbytes")
    write_tower(tmp_path / "vision_clip", "clip", hidden_size=64, intermediate_size=128)
    model, _ = composed(tmp_path)
    apply_tuning(model, TuneConfig.model_validate({"vision": {"mode": tune}}), seed=0)
    pixels = torch.randn(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.image_features(pixels)
        count = quantize_frozen(model, "vision", frozen_format, dtype=torch.float32, device=CPU)
        found = model.image_features(pixels)
    kind = {"int8": bnb.nn.Linear8bitLt, "nf4": bnb.nn.Linear4bit}[frozen_format]
    compact = [name for name, module in model.named_modules() if isinstance(module, kind)]
    # Two layers (features are taken before the third) of six linear layers.
    assert count == len(compact) == 2 * 6
    assert all(model.module_map.role_of(name) == "vision" for name in compact)
    assert 0 < float((found - expected).norm() / expected.norm()) < near


def test_layers_over_maps_of_four_dimensions_are_held_in_8_bits_too(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    model, _ = composed(tmp_path, vision="convnextv2")
    pixels = torch.randn(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    with torch.no_grad():
        expected = model.image_features(pixels)
        assert quantize_frozen(model, "vision", "int8", dtype=torch.float32, device=CPU) > 0
        found = model.image_features(pixels)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.03
    assert not caplog.records  # not a line for every product
