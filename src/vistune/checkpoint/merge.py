"""Folds adapters into the weights they stand beside, and measures that nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistune.errors import CheckpointError
from vistune.models.tune.lora import adapter_layers

# fp32 rounding of another order of summation, relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeCheck:
    """What merging changed.

    Args:
        num_layers: Layers whose adapters were folded in.
        max_abs_error: Largest difference of an output before and after.
        max_abs_value: Largest output before.
    """

    num_layers: int
    max_abs_error: float
    max_abs_value: float


@torch.no_grad()
def merge_adapters(model: nn.Module) -> int:
    """Folds every adapter into its base weight, in place; the sums are made in fp32.

    Args:
        model: A model with or without adapters. Merged layers are plain linear layers again.

    Returns:
        The number of layers merged.
    """
    layers = adapter_layers(model)
    for name, layer in layers.items():
        base = layer.base_layer
        stored = base.weight.dtype
        # Peft adds in the format of the weight; in 16 bit a small update would be lost before
        # the one rounding that is needed.
        base.weight.data = base.weight.data.float()
        layer.merge(safe_merge=False)
        base.weight.data = base.weight.data.to(stored)
        base.requires_grad_(False)
        model.set_submodule(name, base)
    return len(layers)


@torch.no_grad()
def merge_and_check(model: nn.Module, outputs: Callable[[], Tensor]) -> MergeCheck:
    """Merges and compares the model's outputs before and after.

    Args:
        model: Changed in place.
        outputs: Runs the model on inputs of the caller's choice, in evaluation mode.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: The outputs differ by more than rounding.
    """
    training = model.training
    model.eval()
    before = outputs().float()
    num_layers = merge_adapters(model)
    after = outputs().float()
    model.train(training)
    error = float((after - before).abs().max())
    largest = float(before.abs().max())
    tolerance = max(_TOLERANCE.get(p.dtype, 5e-2) for p in model.parameters())
    if not error <= tolerance * max(largest, 1e-6):
        raise CheckpointError(
            "the merged model answers differently from the model with adapters",
            got=f"outputs differ by {error:.2e}, the largest being {largest:.2e}",
            expected=f"at most {tolerance:.0e} of the largest",
        )
    return MergeCheck(num_layers, error, largest)


def max_abs_error(expected: Any, found: Any) -> float:
    """Returns the largest difference of two tensors, computed in fp32."""
    return float((expected.float() - found.float()).abs().max())
