"""What a tower costs whose images have any size: read from its modules, counted by their grids.

It knows the towers of transformers' own models: every patch passes every linear layer, and attends
to its image or tile, or to a window of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vistune.models.contract import TunableModel
from vistune.models.native.model import NativeVLM
from vistune.types import ImageShape, RoleName

_INPUTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "query", "key", "value"}
_FLAT_NDIM = 2  # patches [P, values]; tiles have channels, rows and columns


@dataclass(frozen=True)
class PatchTower:
    """A tower's work as a function of the grids of patches it is shown.

    Args:
        weights: Of the linear layers, adapters left out; every patch passes them.
        first: Weights of the layer that reads pixels.
        adapters: Weights of LoRA factors.
        inputs: Weights of the first block's query, key and value projections and of the first
            factors of their adapters.
        width: Summed width of the attention's heads.
        windows: For each block the side of the windows its attention stays in, in tokens; None for
            the whole image.
        merge: Side of the square of patches that becomes a token.
        patch_px: Side of a patch.
        num_class_tokens: Positions of an image beside its patches.
    """

    weights: int
    first: int
    adapters: int
    inputs: int
    width: int
    windows: tuple[int | None, ...]
    merge: int
    patch_px: int
    num_class_tokens: int

    def grids(
        self, pixel_shape: Sequence[int], image_shapes: Sequence[ImageShape]
    ) -> list[tuple[int, int]]:
        """Returns rows and columns of patches of every image or tile.

        Args:
            pixel_shape: Of the row's pixel tensor.
            image_shapes: What the layout says of its images.
        """
        if len(pixel_shape) == _FLAT_NDIM:
            return [(rows, columns) for _, rows, columns in image_shapes]
        *lead, _, height, width = pixel_shape
        if height == width == self.patch_px:  # patches, as PaddleOCR-VL takes them
            return [(rows, columns) for _, rows, columns in image_shapes]
        return [(height // self.patch_px, width // self.patch_px)] * math.prod(lead)

    def products(
        self, weights: int, grids: Sequence[tuple[int, int]], *, classes: bool = True
    ) -> int:
        """Returns the operations of products that every position passes.

        Args:
            weights: Their weights.
            grids: See `grids`.
            classes: Whether positions beside the patches pass them too.
        """
        extra = self.num_class_tokens if classes else 0
        return 2 * weights * sum(rows * columns + extra for rows, columns in grids)

    def attention(self, grids: Sequence[tuple[int, int]]) -> int:
        """Returns the operations of attention, forward."""
        pairs = (self._pairs(*grid, window) for grid in grids for window in self.windows)
        return 4 * self.width * sum(pairs)

    def forward(self, grids: Sequence[tuple[int, int]]) -> int:
        """Returns the operations of a forward pass, those of adapters included."""
        linear = self.products(self.weights + self.adapters, grids)
        return linear + self.products(self.first, grids, classes=False) + self.attention(grids)

    def num_connector_tokens(self, grids: Sequence[tuple[int, int]]) -> int:
        """Returns the tokens that pass the connector."""
        return sum(rows * columns for rows, columns in grids) // self.merge**2

    def _pairs(self, rows: int, columns: int, window: int | None) -> int:
        if window is None:
            return (rows * columns + self.num_class_tokens) ** 2
        sides = [_squares(n // self.merge, window) for n in (rows, columns)]
        return self.merge**4 * sides[0] * sides[1]


def _squares(length: int, window: int) -> int:
    """Returns the squared lengths of the windows along one side, summed."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


def patch_tower(model: NativeVLM) -> PatchTower | None:
    """Reads a tower's work from its modules.

    Args:
        model: Adapters in place; may be on `meta`.

    Returns:
        None for a tower whose cost does not follow from its linear layers.
    """
    unused, vision = model.never_trained, model.config.vision_config
    linear: dict[str, nn.Linear] = {}
    patches: list[int] = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(getattr(module, "weight", None), nn.Parameter) or weight in unused:
            continue
        if model.module_map.role_of(weight) != "vision":
            continue
        if isinstance(module, nn.Linear):
            linear[name] = module
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            patches.append(module.weight.numel())
    blocks = largest_stack(model, "vision")
    width = _attention_width(linear)
    if len(patches) != 1 or not blocks or width is None:
        return None
    if vision.model_type == "pixtral":  # attends over all images of a row, the masked pairs too
        return None
    adapters = sum(m.weight.numel() for n, m in linear.items() if ".lora_" in n)
    whole = sum(m.weight.numel() for m in linear.values())
    named = [name for name, _ in model.named_parameters()]
    class_tokens = [name for name in named if name.endswith(("cls_token", "class_embedding"))]
    return PatchTower(
        weights=whole - adapters,
        first=patches[0],
        adapters=adapters,
        inputs=input_weights(blocks[0]),
        width=width,
        windows=_windows(vision, len(blocks), merge=model.grid.downsample),
        merge=model.grid.downsample,
        patch_px=model.grid.patch_px,
        num_class_tokens=len(class_tokens),
    )


def largest_stack(model: TunableModel, role: RoleName) -> list[nn.Module]:
    """Returns a role's blocks that gradients reach, in order: the largest list of modules it has.

    Args:
        model: Any model with roles.
        role: The role.
    """
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and model.module_map.role_of(f"{name}.0") == role
    ]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda found: sum(p.numel() for p in found[1][0].parameters()))
    unused = tuple(model.never_trained)
    return [
        block
        for index, block in enumerate(blocks)
        if not any(parameter.startswith(f"{name}.{index}.") for parameter in unused)
    ]


def input_weights(block: nn.Module) -> int:
    """Returns the weights of what reads a block's input first, adapters' first factors included.

    Args:
        block: A block of a transformer, adapters in place.
    """
    return sum(
        part.weight.numel()
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear)
        and not _INPUTS.isdisjoint(name.split("."))
        and ".lora_B" not in name
    )


def _attention_width(linear: dict[str, nn.Linear]) -> int | None:
    for name, module in linear.items():
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        if last in ("q_proj", "query"):
            return module.out_features
        if last in ("qkv", "qkv_proj"):
            return module.out_features // 3
    return None


def _windows(vision: Any, num_blocks: int, *, merge: int) -> tuple[int | None, ...]:
    whole = getattr(vision, "fullatt_block_indexes", None)
    if whole is None:
        return (None,) * num_blocks
    side = int(vision.window_size) // int(vision.patch_size) // merge
    return tuple(None if index in whole else side for index in range(num_blocks))


def connector_products(model: NativeVLM) -> tuple[tuple[int, ...], frozenset[int]]:
    """Returns the weights of the connector's products in order, and which of them come first.

    A product comes first where nothing that trains stands between it and the tower.

    Args:
        model: May be on `meta`.
    """
    products: list[int] = []
    first: set[int] = set()
    modules = dict(model.named_modules())
    behind_weights = False
    for prefix in model.module_map.connector:
        parts = modules.get(prefix, nn.Module())
        # The members of a list stand side by side; modules that are named follow each other.
        for branch in parts if isinstance(parts, nn.ModuleList) else [parts]:
            behind_weights = behind_weights and not isinstance(parts, nn.ModuleList)
            for module in branch.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    if not behind_weights:
                        first.add(len(products))
                    products.append(module.weight.numel())
                behind_weights |= bool(module._parameters) and module is not branch
            # A matrix of the connector's own (Gemma 3) stands behind the modules in it.
            own = [] if isinstance(branch, nn.Linear) else branch.parameters(recurse=False)
            products += [matrix.numel() for matrix in own if matrix.dim() == 2]
            behind_weights |= bool(branch._parameters)
    return tuple(products), frozenset(first)
