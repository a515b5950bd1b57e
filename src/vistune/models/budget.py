"""Settles `auto` in a recipe from the memory of a device: how long rows are, what is recomputed.

It decides from the predictions of `models.memory`; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from vistune.models.anyres import square_of, tiles_of
from vistune.models.memory import MemoryModel, RowSize, memory_model
from vistune.models.native import is_native_config
from vistune.models.native_memory import NativeMemory, native_memory
from vistune.models.native_passes import num_patches
from vistune.recipe import ModelConfig, Recipe, TilesConfig
from vistune.types import Batch, VisionGrid

if TYPE_CHECKING:
    import torch

    from vistune.models.facts import ModelFacts

StepMemory: TypeAlias = MemoryModel | NativeMemory
LONGEST_ROW = 32_768
"""Rows are not made longer than this by themselves: kernels are busy well before."""
CPU_ROW = 4_096
"""A CPU is busy with far fewer tokens."""
_STEP = 512
_SHORTEST_ROW = 2_048
_USABLE_FRAC = 0.94
"""Of a device's memory: the rest is lost between an allocator's blocks."""
_CONTEXT_BYTES = int(0.8 * 2**30)
"""Kernels and libraries, outside of tensors."""
_TEXT_TOKENS = 24


@dataclass(frozen=True)
class Settled:
    """What was chosen for `auto`.

    Args:
        max_tokens: Tokens of a row.
        checkpoint_layers: Layers computed again.
        fits: Whether the prediction stays within the budget.
        said: What was chosen and why, one sentence each; empty when nothing was open.
    """

    max_tokens: int
    checkpoint_layers: int
    fits: bool
    said: tuple[str, ...] = ()

    def apply(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with numbers in place of `auto`."""
        batch = recipe.batch.model_copy(update={"max_tokens": self.max_tokens})
        train = recipe.train.model_copy(update={"checkpoint_layers": self.checkpoint_layers})
        return recipe.model_copy(update={"batch": batch, "train": train})


def usable_bytes(memory_gib: float) -> int:
    """Returns how much of a device's memory tensors may take."""
    return max(0, int(_USABLE_FRAC * memory_gib * 2**30) - _CONTEXT_BYTES)


def fullest_row(
    num_tokens: int, grid: VisionGrid, *, num_rows: int = 2, tiles: TilesConfig | None = None
) -> RowSize:
    """Returns the row of a length that needs most memory: short captions of as many images as fit.

    Args:
        num_tokens: Its length.
        grid: Image tokens of a picture.
        num_rows: Rows of the step.
        tiles: How pictures are cut into tiles; the tower then sees several views of each, which
            are what is counted.
    """
    num_views = most_views(num_tokens, grid, tiles=tiles, num_beside=_TEXT_TOKENS)
    return RowSize(num_tokens, num_views, num_tokens // 2, num_tokens, num_rows)


def most_views(
    num_tokens: int, grid: VisionGrid, *, tiles: TilesConfig | None = None, num_beside: int = 0
) -> int:
    """Returns the most images that a tower sees where so many tokens stand for them.

    Args:
        num_tokens: How many.
        grid: Image tokens of a picture.
        tiles: How pictures are cut into tiles.
        num_beside: Of the tokens, how many stand beside each picture for other things.
    """
    side = grid.fixed_size_px or grid.patch_px * grid.downsample * 16
    view = grid.num_tokens(side, side)
    shapes = ((view, 1),) if tiles is None else (square_of(one, view) for one in tiles.grids)
    return max(-(-num_tokens // (each + num_beside)) * views for each, views in shapes)


def fullest_native_row(num_tokens: int, memory: NativeMemory, *, num_rows: int = 2) -> RowSize:
    """As `fullest_row`, for a model whose images have any size.

    Args:
        num_tokens: Its length.
        memory: The model's memory, which knows its images.
        num_rows: Rows of the step.
    """
    each = memory.image.num_tokens
    num_images = -(-num_tokens // (each + _TEXT_TOKENS))
    patches = min(num_tokens, num_images * each) * memory.patches_per_token
    pairs = num_images * (each + _TEXT_TOKENS) ** 2
    return RowSize(
        num_tokens, num_images, num_tokens // 2, num_tokens, num_rows, int(patches), pairs
    )


@dataclass(frozen=True)
class Room:
    """A model's memory and the device it has to fit into.

    Args:
        memory: The model's memory.
        grid: Image tokens of a picture.
        memory_gib: Memory of the device.
        on_cpu: Whether the device is a CPU.
        tiles: How pictures are cut into tiles, if they are.
    """

    memory: StepMemory
    grid: VisionGrid
    memory_gib: float
    on_cpu: bool = False
    tiles: TilesConfig | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        parts: ModelConfig,
        facts: ModelFacts,
        *,
        dtype: torch.dtype,
        kind: str,
        memory_gib: float,
    ) -> Room:
        """Works out the memory of a recipe's model.

        Args:
            recipe: What trains, and how.
            parts: The model's parts.
            facts: Their configs.
            dtype: Format of frozen weights and activations.
            kind: Kind of the device.
            memory_gib: Its memory.

        Raises:
            ModelError: The model cannot be planned.
        """
        if facts.whole_config is not None and is_native_config(facts.whole_config):
            native = native_memory(
                facts, tune=recipe.tune, train=recipe.train, dtype=dtype, kind=kind
            )
            return cls(native, facts.grid, memory_gib, kind == "cpu")
        fused = recipe.train.fused == "on" or (recipe.train.fused == "auto" and kind == "cuda")
        memory = memory_model(
            parts,
            facts,
            tune=recipe.tune,
            train=recipe.train,
            dtype=dtype,
            fused=fused,
            kind=kind,
        )
        return cls(memory, facts.grid, memory_gib, kind == "cpu", tiles_of(facts))

    def settle(self, recipe: Recipe) -> Settled:
        """Chooses what a recipe leaves open.

        Args:
            recipe: `batch.max_tokens` and `train.checkpoint_layers` may be `auto`.
        """
        budget = usable_bytes(self.memory_gib)
        fixed_layers, tokens = recipe.train.checkpoint_layers, recipe.batch.max_tokens
        num_layers = self.memory.num_layers
        layers = range(num_layers + 1) if fixed_layers == "auto" else (fixed_layers,)
        said = []
        if tokens == "auto":
            longest = min(
                CPU_ROW if self.on_cpu else LONGEST_ROW, recipe.batch.tokens or LONGEST_ROW
            )
            shortest = min(_SHORTEST_ROW, longest)
            lengths = range(longest, shortest - 1, -_STEP)
            fitting = (n for n in lengths if self._peak(n, layers[0]) <= budget)
            tokens = next(fitting, shortest)
            said.append(f"batch.max_tokens {tokens:,}")
        assert tokens != "auto"
        again = next((n for n in layers if self._peak(tokens, n) <= budget), layers[-1])
        if fixed_layers == "auto":
            said.append(f"train.checkpoint_layers {again} of {num_layers}")
        peak = self._peak(tokens, again)
        if said:
            said.append(f"predicted peak {peak / 2**30:.1f} of {self.memory_gib:.1f} GiB")
        return Settled(tokens, again, peak <= budget, tuple(said))

    def fullest(self, num_tokens: int) -> RowSize:
        """Returns the row of a length that needs most memory."""
        if isinstance(self.memory, NativeMemory):
            return fullest_native_row(num_tokens, self.memory)
        return fullest_row(num_tokens, self.grid, tiles=self.tiles)

    def _peak(self, num_tokens: int, again: int) -> int:
        return self.memory.predict(self.fullest(num_tokens), checkpoint_layers=again).peak

    def advice(self, rows: Sequence[Batch], *, tried_layers: int = -1) -> str:
        """Returns the setting that is predicted to make rows fit, as words for an error message.

        Args:
            rows: The rows that did not fit.
            tried_layers: Layers recomputed when they did not: only more of them can help.
        """
        longest = max(rows, key=lambda row: row.num_tokens)
        pixels = longest.pixel_values_NCYX
        size = RowSize(
            num_tokens=longest.num_tokens,
            num_images=0 if pixels is None else pixels.shape[0],
            num_targets=longest.num_targets,
            num_tail_tokens=longest.num_tokens,
            num_rows=len(rows),
            num_patches=0 if pixels is None else num_patches(pixels.shape, self.grid.patch_px),
            num_pairs=int((longest.cu_seqlens.diff().long() ** 2).sum()),
        )
        budget = usable_bytes(self.memory_gib)
        peak = self.memory.predict(size, checkpoint_layers=self.memory.num_layers).peak
        for again in range(tried_layers + 1, self.memory.num_layers + 1):
            peak = self.memory.predict(size, checkpoint_layers=again).peak
            if peak <= budget:
                return (
                    f"train.checkpoint_layers={again} is predicted to need {peak / 2**30:.1f} of"
                    f" {self.memory_gib:.1f} GiB"
                )
        if peak <= budget:
            return (
                f"With every layer recomputed {peak / 2**30:.1f} of {self.memory_gib:.1f} GiB are"
                " predicted, which was not enough: see what else is on the device"
            )
        return (
            f"Even with every layer recomputed {peak / 2**30:.1f} of {self.memory_gib:.1f} GiB are"
            " predicted: lower batch.max_tokens, or set tune.language.frozen_format=nf4 or"
            " train.optimizer=adamw_8bit"
        )
