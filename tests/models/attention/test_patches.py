"""Towers whose images lie end to end: one call for all of them, with the images kept apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

from native_dirs import write_native

from vistune.assembly import load_assembled
from vistune.device.attention import AttentionChoice
from vistune.errors import ModelError
from vistune.models.attention import install, is_patch_name
from vistune.models.attention.install import install_attention
from vistune.models.attention.patches import patch_attention
from vistune.models.attention.per_sample import PerSample

KINDS = {"qwen2_vl": 2, "qwen2_5_vl": 3, "qwen3_vl": 3, "glm4v": 2}
"""Kinds and the blocks of their towers."""
GRIDS = ((1, 6, 10), (1, 2, 2), (1, 4, 6))


def features(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    number = sum(rows * columns for _, rows, columns in GRIDS)
    first = next(model.parameters())
    patches = torch.randn(number, 3 * 2 * 4 * 4).to(first)
    with torch.no_grad():
        out = model.inner.model.get_image_features(**model.family.image_inputs(patches, GRIDS))
    return torch.cat(list(out.pooler_output))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_as_transformers_with_a_call_for_each_image(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_assembled(write_native(kind, tmp_path / "model")).model
    calls: list[int] = []
    attend = PerSample.attend

    def counted(self: PerSample, *arguments: Any) -> torch.Tensor:
        calls.append(arguments[3].cu_seqlens.numel() - 1)
        return attend(self, *arguments)

    monkeypatch.setattr(PerSample, "attend", counted)
    ours = features(model)
    # One call for each block; windows (of Qwen2.5-VL) are more stretches than images.
    assert len(calls) == KINDS[kind] and min(calls) == len(GRIDS)
    assert (max(calls) > len(GRIDS)) == (kind == "qwen2_5_vl")
    model.inner.model.visual.config._attn_implementation = "sdpa"
    # The same products; images of one length are one batch here.
    assert torch.allclose(ours, features(model), rtol=1e-5, atol=1e-6)
    assert len(calls) == KINDS[kind]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_kernel_for_all_images_on_a_gpu(tmp_path: Path, kind: str) -> None:
    model: Any = load_assembled(write_native(kind, tmp_path / "model")).model
    model.to(device="cuda", dtype=torch.bfloat16)
    where = torch.device("cuda")
    done = install_attention(model, wanted="auto", dtype=torch.bfloat16, device=where)
    assert done.vision.name == "varlen"
    ours = features(model).float()
    model.inner.model.visual.config._attn_implementation = "sdpa"
    theirs = features(model).float()
    # bf16 through two or three blocks: 8 bits of mantissa.
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_the_choice_is_said_and_put_in_place(tmp_path: Path) -> None:
    model: Any = load_assembled(write_native("qwen2_5_vl", tmp_path / "model")).model
    before = features(model)
    tower = model.inner.model.visual.config
    done = install_attention(model, wanted="auto", dtype=torch.float32, device=torch.device("cpu"))
    assert "vision tower: sdpa (images of any size end to end)" in str(done)
    assert is_patch_name(tower._attn_implementation)
    assert tower._attn_implementation.endswith("sdpa")
    assert torch.equal(features(model), before)


@pytest.mark.parametrize("named", ["cudnn", "flex", "npu"])
def test_one_named_for_the_language_model_alone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Any
) -> None:
    model: Any = load_assembled(write_native("qwen2_5_vl", tmp_path / "model")).model
    monkeypatch.setattr(install, "choose_attention", lambda *_: AttentionChoice("sdpa", "a test"))
    where = torch.device("cpu")
    done = install_attention(model, wanted=named, dtype=torch.float32, device=where)
    assert done.vision.name == "sdpa" and f"; {named} is for the language" in done.vision.reason


def test_what_is_no_such_tower_is_refused() -> None:
    qkv = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    edges = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ModelError, match="by their boundaries"):
        patch_attention(nn.Identity(), *qkv, None)
    with pytest.raises(ModelError, match="by their boundaries"):
        patch_attention(nn.Identity(), *qkv, None, cu_seq_lens_q=edges, is_causal=True)
    with pytest.raises(ModelError, match="do not offer"):
        patch_attention(nn.Identity(), *qkv, None, cu_seq_lens_q=edges, head_mask=edges)
    out, _ = patch_attention(nn.Identity(), *qkv, None, cu_seq_lens_q=edges)
    alone, _ = patch_attention(
        nn.Identity(), *(x[:, :, :2] for x in qkv), None, cu_seq_lens_q=edges[:2], max_length_q=2
    )
    assert torch.allclose(out[:, :2], alone)
