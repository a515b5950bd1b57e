"""Works out a recipe's memory and time on a device, present or only named.

Memory is predicted (`models.memory`); a step's time is an estimate, because it takes for granted
which share of a device's matrix products a step reaches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vistune.assembly import draw
from vistune.device import select_device
from vistune.device.attention import (
    HOPPER,
    USUAL_HEAD,
    AttentionNeeds,
    AttentionSupport,
    choose_attention,
)
from vistune.device.bits import require_fp8_capability
from vistune.device.peak import free_memory_gib
from vistune.errors import ModelError
from vistune.models.budget import Room, Settled, most_views, usable_bytes
from vistune.models.flops import RowLengths, row_flops
from vistune.models.memory import Prediction, RowSize
from vistune.models.native_memory import NativeMemory
from vistune.plan.devices import KNOWN_DEVICES, KnownDevice, present_device
from vistune.recipe import Recipe, sizes

if TYPE_CHECKING:
    from vistune.assembly import Blueprint
    from vistune.data.heaviest import HeavyRow
    from vistune.data.report import CheckReport

REACHED_FRAC = {
    ("fused", "freeze"): 0.74,
    ("fused", "lora"): 0.65,
    ("fused", "full"): 0.69,
    ("fp8", "freeze"): 1.15,
    ("fp8", "lora"): 0.90,
}
"""Share of a device's 16-bit matrix products that a step of fused layers reaches: measured on an
H200 with 7B, rows of 12k to 19k tokens (bench/README.md). FP8 products go beyond 1."""
PLAIN_FRAC = 0.5
"""The same for transformers' own layers: taken for granted, not measured."""


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Args:
        device: The device.
        settled: The recipe's row length and recomputed layers, `auto` replaced.
        row: The row that is predicted: of several, the one that needs most.
        which: What is most in that row, where it is of the data; None: the fullest of its length.
        prediction: Its memory.
        room: The model and the device.
        row_seconds: Estimated time of that row; None where the device's rate or the model's cost is
            not known.
        row_tflop: Operations that row needs, in TFLOP, or None.
        num_steps: Optimizer steps of the run; None where the data was not read.
        step_seconds: Estimated time of a step; None where its rows are not known either: how many
            `batch.samples` fill is in the data alone.
        run_seconds: Estimated time of the run, or None.
        cost: `run_seconds` times the price an hour, or None.
    """

    device: KnownDevice
    settled: Settled
    row: RowSize
    which: str | None
    prediction: Prediction
    room: Room
    row_seconds: float | None
    row_tflop: float | None
    num_steps: int | None
    step_seconds: float | None
    run_seconds: float | None
    cost: float | None

    @property
    def fits(self) -> bool:
        """Whether the prediction stays within what the device leaves to tensors."""
        return self.prediction.peak <= usable_bytes(self.device.memory_gib)


def make_plan(
    recipe: Recipe,
    *,
    device: str | None = None,
    memory_gib: float | None = None,
    price_per_hour: float | None = None,
    read_data: bool = False,
    blueprint: Blueprint | None = None,
) -> Plan:
    """Plans a recipe.

    Args:
        recipe: The recipe.
        device: Name of a known device; the present one when left out.
        memory_gib: Its memory, when it is another.
        price_per_hour: What an hour of it costs, in any currency.
        read_data: Read the rows' lengths (text and image headers) for the rows that a run would
            rehearse and the number of steps.
        blueprint: The recipe's model, where it is described already.

    Raises:
        RegistryError: No such device is known.
        DeviceError: A run would refuse a setting on that device.
        ModelError: The model is not there, cannot be planned, or lacks what a setting asks for.
    """
    blueprint = blueprint or draw(recipe)
    target = target_of(recipe, device, memory_gib=memory_gib)
    _require_runs_there(recipe, target)
    room = _room(recipe, blueprint, target)
    _require_runs(recipe, room)
    settled = room.settle(recipe)
    recipe = settled.apply(recipe)
    which, row, num_steps = None, room.fullest(settled.max_tokens), recipe.train.steps
    rows_per_step: float | None = None
    if recipe.batch.tokens is not None:
        rows_per_step = max(1.0, recipe.batch.tokens / settled.max_tokens)
        row = replace(row, num_rows=round(rows_per_step))
    prediction = room.memory.predict(row, checkpoint_layers=settled.checkpoint_layers)
    if read_data:
        read = _read(recipe, blueprint, room)
        num_steps = read.num_steps
        which, row, prediction = _largest(read, room, settled.checkpoint_layers)
        rows_per_step = read.tokens_per_step / row.num_tokens
    tflop, seconds = _row_time(recipe, room, row, target, settled)
    step_seconds = None
    if seconds is not None and rows_per_step is not None:
        step_seconds = seconds * rows_per_step
    run_seconds = None
    if step_seconds is not None and num_steps is not None:
        run_seconds = step_seconds * num_steps
    cost = None
    if run_seconds is not None and price_per_hour is not None:
        cost = run_seconds / 3600 * price_per_hour
    return Plan(
        device=target,
        settled=settled,
        row=row,
        which=which,
        prediction=prediction,
        room=room,
        row_seconds=seconds,
        row_tflop=tflop,
        num_steps=num_steps,
        step_seconds=step_seconds,
        run_seconds=run_seconds,
        cost=cost,
    )


def _require_runs_there(recipe: Recipe, target: KnownDevice) -> None:
    """Refuses what a run would refuse on a device; packages that may lack there are not asked for.

    Raises:
        DeviceError: The device has not what a setting names.
    """
    support = AttentionSupport(
        target.kind, hopper=target.capability == HOPPER, flash=2, npu=True, cudnn=True
    )
    needs = AttentionNeeds(USUAL_HEAD, dtype_of(recipe, target))
    choose_attention(recipe.train.attention, support, needs)
    if recipe.tune.held_format("language") == "fp8":
        require_fp8_capability(target.capability, name=target.name)


def _require_runs(recipe: Recipe, room: Room) -> None:
    """Refuses what a run would refuse for its model.

    Raises:
        ModelError: It has fewer layers, or none that run fused.
    """
    layers, there = recipe.train.checkpoint_layers, room.memory.num_layers
    if layers != "auto" and layers > there:
        raise ModelError(
            f"the language model has {there} layers",
            where="train.checkpoint_layers",
            got=str(layers),
            expected=f"0 to {there}",
        )
    if recipe.tune.held_format("language") == "fp8" and not room.memory.fused:
        raise ModelError(
            "FP8 runs in fused layers, and these do not run fused: train.fused=off, adapters with"
            " DoRA, or layers without a fused form",
            where="tune.language.frozen_format",
            fix="set tune.language.frozen_format=same, or change what stands in the way",
        )


def settle(recipe: Recipe, blueprint: Blueprint) -> Recipe:
    """Returns a recipe with numbers in place of `auto`, for the device that is present."""
    if "auto" not in (recipe.batch.max_tokens, recipe.train.checkpoint_layers):
        return recipe
    device = select_device(recipe.device, recipe.dtype)
    room = Room.of(
        recipe,
        blueprint.parts,
        blueprint.facts,
        dtype=device.dtype,
        kind=device.kind,
        memory_gib=free_memory_gib(device),
    )
    return room.settle(recipe).apply(recipe)


def target_of(recipe: Recipe, name: str | None, *, memory_gib: float | None) -> KnownDevice:
    """Returns the device to plan for.

    Args:
        recipe: Says which device a run would take here.
        name: Name of a known device; the present one when left out.
        memory_gib: Its memory, when it is another.

    Raises:
        RegistryError: No such device is known.
    """
    if name is None:
        target = present_device(select_device(recipe.device, recipe.dtype))
    else:
        target = KNOWN_DEVICES.get(name)
    return target if memory_gib is None else replace(target, memory_gib=memory_gib)


def dtype_of(recipe: Recipe, target: KnownDevice) -> torch.dtype:
    """Returns the format a recipe's frozen weights have on a device."""
    formats = {"auto": target.dtype, "fp32": torch.float32, "bf16": torch.bfloat16}
    return formats[recipe.dtype]


def _room(recipe: Recipe, blueprint: Blueprint, target: KnownDevice) -> Room:
    return Room.of(
        recipe,
        blueprint.parts,
        blueprint.facts,
        dtype=dtype_of(recipe, target),
        kind=target.kind,
        memory_gib=target.memory_gib,
    )


@dataclass(frozen=True)
class _Read:
    """What the data says: the rows that may need most memory, steps, tokens of a step's rows."""

    rows: tuple[tuple[str, RowSize], ...]
    num_steps: int
    tokens_per_step: float


def _read(recipe: Recipe, blueprint: Blueprint, room: Room) -> _Read:
    """Reads lengths and plans the first epoch.

    Args:
        recipe: Settled.
        blueprint: The recipe's model.
        room: Knows its images.
    """
    from vistune.data.check import check_sources
    from vistune.data.heaviest import heaviest_rows
    from vistune.data.loader import TrainData

    most = recipe.batch.row_tokens
    report = check_sources(
        recipe.data.train,
        blueprint.encoder,
        max_tokens=most,
        overlong=recipe.data.overlong,
        workers=recipe.data.workers,
    )
    data = TrainData(recipe.data, recipe.batch, blueprint.encoder, recipe.seed, report=report)
    try:
        plans = list(itertools.islice(data.plans(0), data.steps_per_epoch(0)))
        steps = sizes.num_steps(recipe.train, data.steps_per_epoch)
    finally:
        data.close()
    filled = recipe.train.compile == "static_blocks"  # every row is filled up to one length
    rows = []
    for heavy in heaviest_rows(plans, report.lengths, report.image_tokens):
        size = _size(heavy, report, room)
        rows.append((heavy.what, replace(size, num_tokens=most) if filled else size))
    samples = [row for plan in plans for row in plan.rows]
    tokens = len(samples) * most
    if not filled:
        tokens = sum(int(report.lengths[list(row)].sum()) for row in samples)
    return _Read(tuple(rows), steps, tokens / max(1, len(plans)))


def _size(heavy: HeavyRow, report: CheckReport, room: Room) -> RowSize:
    """Returns what of a row decides its memory; targets are taken as spread evenly over tokens."""
    mine = list(heavy.samples)
    lengths = report.lengths[mine].astype(np.int64)
    tokens, seen = int(lengths.sum()), int(report.image_tokens[mine].sum())
    num_images = most_views(seen, room.grid, tiles=room.tiles)
    if room.tiles is None and room.grid.fixed_size_px is not None:  # all have as many tokens
        num_images = -(-report.num_images * seen // max(1, report.num_image_tokens))
    targets = int(report.num_target_tokens * tokens / max(1, report.num_tokens))
    return RowSize(
        num_tokens=tokens,
        num_images=num_images,
        num_targets=targets,
        num_tail_tokens=targets,
        num_rows=1 + heavy.num_before,
        num_patches=_patches(room, seen),
        num_pairs=int((lengths**2).sum()),
    )


def _largest(read: _Read, room: Room, checkpoint_layers: int) -> tuple[str, RowSize, Prediction]:
    """Returns the row that is predicted to need most, what is most in it, and its prediction."""
    predicted = (
        (which, row, room.memory.predict(row, checkpoint_layers=checkpoint_layers))
        for which, row in reversed(read.rows)  # the longest first: of equals it is named
    )
    return max(predicted, key=lambda found: found[2].peak)


def _patches(room: Room, num_image_tokens: int) -> int:
    """Returns the most patches that become so many image tokens, where images have any size."""
    if not isinstance(room.memory, NativeMemory):
        return 0
    return int(num_image_tokens * room.memory.patches_per_token)


def _row_time(
    recipe: Recipe, room: Room, row: RowSize, target: KnownDevice, settled: Settled
) -> tuple[float | None, float | None]:
    """Returns the operations of a row in TFLOP and the time they are estimated to take."""
    work = room.memory.work
    if work is None:
        return None, None
    needed = row_flops(work, _lengths(row, room))
    tflop = needed.total / 1e12
    if target.reached_tflops is None:
        return tflop, None
    language = recipe.tune.language
    fp8 = language.mode != "full" and language.frozen_format == "fp8"
    kind = ("fp8" if fp8 else "fused", language.mode)
    reached = REACHED_FRAC[kind] if room.memory.fused else PLAIN_FRAC
    # A layer computed again runs its forward pass twice: a third to a half more of its work.
    again = settled.checkpoint_layers / room.memory.num_layers
    passes = 2 if language.mode == "freeze" else 3
    done = tflop + again * (needed.language + needed.attention) / passes / 1e12
    return tflop, done / (target.reached_tflops * reached)


def _lengths(row: RowSize, room: Room) -> RowLengths:
    """Returns the lengths of a row of images of one size, as many as its samples."""
    grid, memory = room.grid, room.memory
    if isinstance(memory, NativeMemory):
        image = memory.image
        num_images = -(-row.num_patches // image.num_patches)
        first, *rest = image.pixel_shape
        seen = num_images * image.num_tokens
        pixel_shape, shapes = (num_images * first, *rest), image.shapes * num_images
    else:
        num_images, pixel_shape, shapes = row.num_images, (), ()
        side = grid.fixed_size_px or grid.patch_px * grid.downsample * 16
        seen = num_images * grid.num_tokens(side, side)
    num_samples = max(1, num_images)
    return RowLengths(
        samples=(row.num_tokens // num_samples,) * num_samples,
        num_targets=row.num_targets,
        num_images=num_images,
        num_image_tokens=seen,
        pixel_shape=pixel_shape,
        image_shapes=shapes,
    )
