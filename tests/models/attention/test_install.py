from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from stand_ins import FakeNpu
from tiny_parts import composed, packed_logits, row
from torch import nn

from vistune.errors import DeviceError, ModelError
from vistune.models.attention import register_packed_attention
from vistune.models.attention.install import install_attention
from vistune.models.attention.interface import register_row_attention, row_attention
from vistune.models.attention.npu import NpuFusion
from vistune.models.attention.per_sample import PerSample
from vistune.models.contract import ModuleMap

CPU = torch.device("cpu")


def test_a_composed_model_is_told_and_says_so(tmp_path: Path) -> None:
    model, facts = composed(tmp_path)
    before = packed_logits(model, row(facts))
    for wanted in ("auto", "sdpa"):
        done = install_attention(model, wanted=wanted, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
        assert done.language.name == done.vision.name == "sdpa"
        assert model.language_model.config._attn_implementation == "vistune_packed_each"
        assert model.vision_tower.config._attn_implementation == "sdpa"
    assert "language model: sdpa (as the recipe says)" in str(done)
    assert "vision tower: sdpa (images of one size" in str(done)
    assert done.to_json()["language"] == {"name": "sdpa", "reason": "as the recipe says"}
    after = packed_logits(model, row(facts))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(DeviceError, match="the device is cpu"):
        install_attention(model, wanted="varlen", dtype=torch.float32, device=CPU)


class Own(nn.Module):
    """A model with attention of its own."""

    module_map = ModuleMap(("tower",), ("connector",), ("layers",), ())

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(2, 2)


def test_a_model_with_attention_of_its_own_keeps_it() -> None:
    done = install_attention(Own(), wanted="auto", dtype=torch.float32, device=CPU)
    assert done.language.name == done.vision.name == "own"
    with pytest.raises(ModelError, match="of its own"):
        install_attention(Own(), wanted="sdpa", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_a_tower_takes_a_backend_by_name(
    tmp_path: Path, vision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered for unpacked rows: same features and gradients, images kept apart."""
    fake = FakeNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    monkeypatch.setattr(NpuFusion, "refusal", lambda *_: None)  # heads of 6 in the tiny tower
    model, facts = composed(tmp_path, vision=vision)
    model.train()
    pixels = torch.cat([image for image in row(facts).images if image is not None])
    found = []
    for name in ("sdpa", register_row_attention("npu")):
        model.vision_tower.config._attn_implementation = name
        model.zero_grad()
        features = model.image_features(pixels)
        features.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((features.detach(), gradients))
    assert fake.calls and all(call["sparse_mode"] == 0 for call in fake.calls)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_padded_rows_of_a_tower_are_left_to_sdpa() -> None:
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    query, key, value = (torch.randn(2, 2, 5, 8) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    out, _ = row_attention(layer, query, key, value, mask, backend=PerSample())
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[1:], key[1:, :, :3], value[1:, :, :3]
    ).transpose(1, 2)
    torch.testing.assert_close(out[1:], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_a_model_of_transformers_own_takes_a_backend_by_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "native"))
    from native_dirs import write_native
    from test_native import run, sample_of

    from vistune.assembly import load_assembled

    fake = FakeNpu()
    torch.manual_seed(0)
    loaded = load_assembled(write_native(kind, tmp_path / "model"))
    samples = [sample_of(loaded.encoder, (50, 90)), sample_of(loaded.encoder, text="how?")]
    done = install_attention(loaded.model, wanted="auto", dtype=torch.float32, device=CPU)
    assert done.language.name == "sdpa"
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    monkeypatch.setattr(NpuFusion, "refusal", lambda *_: None)
    with torch.no_grad():
        before, _ = run(loaded.model, samples)
        text = loaded.model.inner.config.get_text_config()  # type: ignore[union-attr]
        text._attn_implementation = register_packed_attention("npu")
        after, _ = run(loaded.model, samples)
    assert fake.calls and all(len(call["ends"]) == 2 for call in fake.calls)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
