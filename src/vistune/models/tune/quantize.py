"""Holds a role's frozen linear weights in 8 or 4 bits (bitsandbytes), adapters beside them or not.

It comes last, after adapters and trained weights are in place, so that what is saved, merged and
exported never sees a rounded weight: adapters are merged into the weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistune.device.bits import import_bitsandbytes
from vistune.errors import ModelError
from vistune.models.contract import TunableModel
from vistune.types import RoleName

QUANTISED_ROLES: tuple[Literal["vision", "language"], ...] = ("vision", "language")
"""Roles whose frozen linear layers may be held in 8 or 4 bits."""
_BLOCK = 64
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
    places = frozen_linear(model, role)
    if not places:
        raise ModelError(
            f"the role '{role}' has no frozen linear layer to hold in {frozen_format}",
            where=f"tune.{role}.frozen_format",
            fix=f"set tune.{role}.frozen_format=same",
        )
    if frozen_format == "nf4":
        _check_widths(bitsandbytes, dict(places), dtype, device, role=role)
    for name, linear in places:
        parent_name, _, own_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        held = _rounded(bitsandbytes, linear, frozen_format, dtype, device)
        setattr(parent, own_name, held)
    return len(places)


def frozen_linear(model: TunableModel, role: RoleName) -> list[tuple[str, nn.Linear]]:
    """Returns the linear layers of a role that are frozen and share no weight with an embedding.

    Args:
        model: Tuned.
        role: The role.

    Returns:
        Full names, and the layers.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    module_map = model.module_map
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module_map.role_of(name) == role
        and ".lora_" not in name
        and not any(p.requires_grad for p in module.parameters(recurse=False))
        and id(module.weight) not in tables
    ]


@torch.no_grad()
def _check_widths(
    bitsandbytes: Any,
    layers: Mapping[str, nn.Linear],
    dtype: torch.dtype,
    device: torch.device,
    *,
    role: RoleName,
) -> None:
    """Makes sure that the package rounds rows of these lengths as it should on this device.

    A probe of numbers from small to large stands for the weights: where every block has about the
    same largest number, blocks that are mixed up go unnoticed.

    Raises:
        ModelError: They come back as other numbers. Bitsandbytes 0.50 on a CPU takes every row for
            whole blocks, so rows that are no multiple of 64 numbers share blocks wrongly.
    """
    generator = torch.Generator().manual_seed(0)
    checked = set()
    for name, linear in layers.items():
        width = linear.in_features
        if width in checked:
            continue
        checked.add(width)
        probe = torch.randn(_BLOCK, width, generator=generator)
        probe *= torch.logspace(-2, 0, probe.numel()).view_as(probe)
        probe = probe.to(device=device, dtype=dtype)
        held, state = bitsandbytes.functional.quantize_4bit(
            probe, blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
        )
        back = bitsandbytes.functional.dequantize_4bit(held, state).float()
        error = float((back - probe.float()).norm() / probe.float().norm())
        if not error <= _LARGEST_ERROR:
            raise ModelError(
                f"bitsandbytes does not round rows of {width} numbers rightly on this device",
                where=name,
                got=f"a relative error of {error:.2f}",
                expected=f"at most {_LARGEST_ERROR}; on a CPU, rows of whole blocks of {_BLOCK}",
                fix=f"set tune.{role}.frozen_format=int8 or same",
            )


def _of_any_shape(kind: Any) -> Any:
    """Returns the package's 8-bit layer for inputs of four dimensions too (maps of a ConvNeXt).

    Bitsandbytes 0.50 flattens inputs of three dimensions and fails on more.
    """

    class Linear8bit(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = super().forward(x.flatten(0, -2))
            if x.numel() and found.grad_fn is not None and not self.weight.requires_grad:
                _let_go_of_input(found.grad_fn)
            return found.view(*x.shape[:-1], -1)

    return Linear8bit


def _let_go_of_input(node: Any) -> None:
    """Takes a product's input off its node, which nothing but a weight's gradient reads.

    Held there and not as autograd holds tensors (bitsandbytes 0.50: `tensors` on a GPU, `A` on a
    CPU), it would outlive its layer's backward pass, also of layers that are computed again.
    """
    if hasattr(node, "tensors"):
        node.tensors = (None, None, None)
    if hasattr(node, "A"):
        node.A = None


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
        # On CPUs with AVX512-BF16 the package lays weights out anew at the first pass without
        # gradients (a sample answer), and from then on its products have no backward pass: what
        # trains before the layer would silently get none (bitsandbytes 0.50, `Linear4bit.forward`).
        held.support_avx512bf16_for_cpu = False
        held.weight = kinds.Params4bit(
            weight,
            requires_grad=False,
            blocksize=_BLOCK,
            quant_type="nf4",
            compress_statistics=True,
            module=held,
        )
    else:
        # threshold 0: no outlier columns are kept apart, so that the product is one kernel.
        made = _of_any_shape(kinds.Linear8bitLt)
        held = made(*shape, bias=has_bias, has_fp16_weights=False, threshold=0.0)
        held.weight = kinds.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if has_bias:
        held.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    moved = held.to(device)
    assert isinstance(moved, nn.Module)
    return moved.train(linear.training)
