"""Functions that keep and make what kernels of a GPU keep and make, and compute nothing.

For passes without storage (`models.shadow`) over a model of transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.models.attention.patches import is_patch_name
from vistune.models.native.contract import LooksAhead
from vistune.models.native.model import NativeVLM

_PACKED, _ROWS, _PATCHES = "vistune_counted", "vistune_counted_rows", "vistune_counted_flash_"


def stand_in_kernels(model: NativeVLM, *, repeats: bool) -> None:
    """Has a model attend by a function that keeps what a flash kernel keeps; it computes nothing.

    Attention that looks ahead stays: it is torch's SDPA on every device.

    Args:
        model: Changed in place.
        repeats: Whether key heads are repeated for the query heads that share them.
    """
    _compat.register_attention(_PACKED, partial(_packed, repeats=repeats))
    _compat.register_attention(_ROWS, _rows)
    _compat.register_attention(_PATCHES, _patches)
    if not isinstance(model.family, LooksAhead):
        model.config.get_text_config()._attn_implementation = _PACKED
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in model.module_map.prefixes("vision"))
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None or not f"{name}.".startswith(prefixes):
            continue
        used = getattr(config, "_attn_implementation", None)
        if is_patch_name(used):
            config._attn_implementation = _PATCHES
        elif used == "sdpa":
            config._attn_implementation = _ROWS


class _Flash(torch.autograd.Function):
    """Tensors of a flash kernel: [..., T, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        # Beside them the kernel sums the queries' gradient in fp32.
        at_work = [query.new_empty(query.shape, dtype=torch.float32), torch.empty_like(sums)]
        if key.shape[-2] != query.shape[-2]:
            at_work += [torch.empty_like(query), torch.empty_like(query)]
        del at_work
        return grads


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.dtype is not value.dtype:  # as `attention.auto.attend` does
        query, key = query.to(value.dtype), key.to(value.dtype)
    out: Tensor = _Flash.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    repeats: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    if repeats and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    return _flash(query, key, value), None


def _rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        out, _ = _compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    return _flash(*(x.transpose(1, 2) for x in (query, key, value))), None


def _patches(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    return _flash(*(x.transpose(1, 2) for x in (query, key, value))), None
