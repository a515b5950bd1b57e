"""Holds a role's frozen linear weights in 8 or 4 bits (bitsandbytes), adapters beside them or not.

It comes last, after adapters and trained weights are in place, so that what is saved, merged and
exported never sees a rounded weight: adapters are merged into the weights as they were loaded.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from vistune.device.bits import import_bitsandbytes
from vistune.errors import ModelError
from vistune.models.contract import TunableModel
from vistune.types import RoleName

# Normal numbers rounded to 16 levels in blocks of 64 are off by 0.09 of their norm.
_LARGEST_ERROR = 0.15


def quantize_frozen(
    model: TunableModel,
    role: RoleName,
    frozen_format: Literal["int8", "nf4"],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Replaces a role's frozen linear layers by 8- or 4-bit ones, in place.

    Args:
        model: Tuned, its weights in place; the role's linear layers are moved to `device`.
        role: The role. Its layers are found by full name; the output head is a role of its own,
            and so is never among them, tied or not.
        frozen_format: `int8` (a scale per output) or `nf4` (blocks of 64, scales rounded again).
        dtype: Format of the products.
        device: Where the layers end up.

    Returns:
        Layers replaced.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ModelError: The role has no frozen linear layer, or one that cannot be rounded in blocks.
    """
    bitsandbytes = import_bitsandbytes(f"tune.{role}.frozen_format={frozen_format}")
    places = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and model.module_map.role_of(name) == role
        and ".lora_" not in name
        and not any(p.requires_grad for p in module.parameters(recurse=False))
        and not _is_tied(model, module)
    ]
    if not places:
        raise ModelError(
            f"the role '{role}' has no frozen linear layer to hold in {frozen_format}",
            where=f"tune.{role}.frozen_format",
            fix=f"set tune.{role}.frozen_format=same",
        )
    for name, linear in places:
        parent_name, _, own_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        held = _rounded(bitsandbytes, linear, frozen_format, dtype, device)
        if frozen_format == "nf4":
            _check(bitsandbytes, held, linear, where=name)
        setattr(parent, own_name, held)
    return len(places)


def _is_tied(model: TunableModel, linear: nn.Linear) -> bool:
    return any(m.weight is linear.weight for m in model.modules() if isinstance(m, nn.Embedding))


@torch.no_grad()
def _check(bitsandbytes: Any, held: Any, linear: nn.Linear, *, where: str) -> None:
    """Makes sure that the package rounded as it should: for some widths its CPU code does not.

    Raises:
        ModelError: The rounded weight is another one (seen in 0.50 on a CPU with rows of 32, 48 and
            96 numbers).
    """
    state = held.weight.quant_state
    back = bitsandbytes.functional.dequantize_4bit(held.weight.data, state).float()
    weight = linear.weight.data.to(back.device).float()
    error = float((back - weight).norm() / weight.norm().clamp(min=1e-12))
    if not error <= _LARGEST_ERROR:
        raise ModelError(
            "bitsandbytes does not round a layer of this shape rightly on this device",
            where=where,
            got=f"a relative error of {error:.2f} for {tuple(weight.shape)}",
            expected=f"at most {_LARGEST_ERROR}",
            fix="set tune.language.frozen_format=int8 or same",
        )


def _rounded(
    bitsandbytes: Any,
    linear: nn.Linear,
    frozen_format: Literal["int8", "nf4"],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Returns a layer's 8- or 4-bit form; the rounding happens on the way to the device."""
    shape = (linear.in_features, linear.out_features)
    has_bias = linear.bias is not None
    weight = linear.weight.data.to(dtype)
    kinds = bitsandbytes.nn
    if frozen_format == "nf4":
        held = kinds.Linear4bit(
            *shape, bias=has_bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=True
        )
        held.weight = kinds.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=held
        )
    else:
        # threshold 0: no outlier columns are kept apart, so that the product is one kernel.
        held = kinds.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, threshold=0.0)
        held.weight = kinds.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if has_bias:
        held.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    moved = held.to(device)
    assert isinstance(moved, nn.Module)
    return moved.train(linear.training)
