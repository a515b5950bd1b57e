"""Puts the fused path into a model with a fusable decoder, and says what it did or why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from vistune import _compat
from vistune.device import has_triton
from vistune.device.bits import require_fp8
from vistune.errors import ModelError
from vistune.models.compose import ComposedVLM
from vistune.models.fused.trunk import FusedTrunk, NotFusable, fuse
from vistune.models.mgm import MGMForConditionalGeneration

if TYPE_CHECKING:
    from vistune.models.whole import WholeModel


def install_fused(
    model: WholeModel,
    *,
    mode: Literal["auto", "on", "off"],
    fp8: bool,
    num_recomputed: int = 0,
) -> str:
    """Makes a model run its decoder layers fused, where it can.

    Args:
        model: On its device, adapters and trained weights in place.
        mode: `train.fused` of the recipe.
        fp8: Hold the language model's frozen weights in FP8.
        num_recomputed: Layers, from the first, that are computed again in the backward pass.

    Returns:
        One sentence on what the layers run as.

    Raises:
        ModelError: `on` (or FP8) is asked for and the model has no fused form.
        DeviceError: FP8 is asked for on a device without it.
    """
    device = next(model.parameters()).device
    if fp8:
        require_fp8(device)
    wanted = mode == "on" or fp8 or (mode == "auto" and has_triton(device))
    if not wanted:
        return "decoder layers: transformers' own"
    if mode == "off":
        raise ModelError(
            "frozen_format=fp8 runs in the fused layers, which train.fused=off turns off",
            where="train.fused",
            fix="set train.fused=auto, or tune.language.frozen_format=same",
        )
    if not isinstance(model, ComposedVLM | MGMForConditionalGeneration):
        if mode == "on" or fp8:
            raise ModelError(
                f"{type(model).__name__} has decoder layers of its own, which have no fused form",
                where="train.fused" if mode == "on" else "tune.language.frozen_format",
                fix="set train.fused=auto and tune.language.frozen_format=same",
            )
        return "decoder layers: the model's own, which have no fused form"
    try:
        trunk = fuse(_compat.decoder_of(model.language_model), device=device, fp8=fp8)
    except NotFusable as reason:
        if mode == "on" or fp8:
            raise ModelError(
                f"the language model cannot run fused: {reason}",
                where="train.fused" if mode == "on" else "tune.language.frozen_format",
                fix="set train.fused=auto and tune.language.frozen_format=same",
            ) from reason
        return f"decoder layers: transformers' own, not fused: {reason}"
    trunk.num_recomputed = num_recomputed
    model.fused = trunk
    return f"decoder layers: fused{', frozen weights in FP8' if fp8 else ''}"


def fused_trunk(model: nn.Module) -> FusedTrunk | None:
    """Returns a model's fused layers, or None where it runs as it was written."""
    if isinstance(model, ComposedVLM | MGMForConditionalGeneration):
        return model.fused
    return None
