"""torch.compile, block by block: decoder layers that do not run fused, and the tower's blocks."""

from __future__ import annotations

from typing import Literal

from torch import nn

from vistune.errors import ModelError
from vistune.models.contract import TunableModel
from vistune.models.recompute import layers_of

CompileMode = Literal["blocks", "static_blocks"]


def compile_blocks(
    model: TunableModel,
    *,
    mode: CompileMode,
    fused: bool,
    attention: str = "sdpa",
    backend: str = "inductor",
) -> str:
    """Compiles a model's blocks in place; each is compiled at its first use.

    Args:
        model: On its device, ready to train.
        mode: `train.compile` of the recipe.
        fused: Whether the decoder's layers run fused: they are functions of their own then.
        attention: Name of the decoder's attention, registered as opaque; `own` for a model that
            brings its own.
        backend: Torch's compiler backend.

    Returns:
        One sentence on what is compiled.

    Raises:
        ModelError: Nothing would be compiled, or rows would be padded for nothing.
    """
    if fused and mode == "static_blocks":
        raise ModelError(
            "static_blocks pads rows for decoder layers that are compiled, and these run fused",
            where="train.compile",
            fix="set train.compile=blocks for the tower alone, or train.fused=off",
        )
    if attention == "own" and mode == "static_blocks":
        raise ModelError(
            "static_blocks pads rows by a sample of nothing, which this model's own attention"
            " does not take",
            where="train.compile",
            fix="set train.compile=blocks, or false",
        )
    if not fused and attention == "flex":
        raise ModelError(
            "attention 'flex' is compiled by itself, which blocks compiled around it would undo",
            where="train.compile",
            fix="set train.attention=sdpa, or train.compile=false",
        )
    said = []
    decoder: list[nn.Module] = [] if fused else layers_of(model, "language")
    for blocks, what in ((decoder, "decoder layers"), (layers_of(model, "vision"), "tower blocks")):
        for block in blocks:
            block.compile(backend=backend)
        if blocks:
            said.append(f"{len(blocks)} {what}")
    if not said:
        raise ModelError(
            "the model has no blocks to compile", where="train.compile", fix="set it to false"
        )
    rows = "rows padded to one length" if mode == "static_blocks" else "rows of any length"
    return f"compiled: {', '.join(said)}; {rows}"
