"""Floating-point operations a row needs, from shapes and lengths alone. It measures nothing.

What is counted, per matrix product of w weights over t tokens:

    forward            2 w t     always
    input gradient     2 w t     where something at or before its input trains
    weight gradient    2 w t     where the weight itself trains

so a frozen layer between a trained connector and the loss costs 4 w t, a trained one 6 w t, and a
frozen vision tower 2 w t. Attention costs 4 d operations for each pair of a query and a key it
sees, over all heads of summed width d (scores and weighted sum), and 8 d backward. Pairs are those
of the causal mask within a sample, n (n + 1) / 2 of n tokens, not n^2. The head runs at target
tokens only; so does, above its keys and values, the last layer where the model computes it from the
first target of a sample on. Nothing that is recomputed is counted, nor norms, activations and the
optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vistune.models.compose import ComposedVLM
from vistune.models.native import NativeVLM
from vistune.models.patch_work import (
    PatchTower,
    connector_products,
    input_weights,
    largest_stack,
    patch_tower,
)
from vistune.models.recompute import decoder_layers
from vistune.models.towers.families import TowerPlan, tower_features
from vistune.recipe import TuneConfig
from vistune.types import ImageShape


@dataclass(frozen=True)
class Weights:
    """Weights in matrix products that see the same tokens.

    Args:
        base: Of the layers themselves.
        adapters: Of LoRA factors beside them.
    """

    base: int = 0
    adapters: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.base + other.base, self.adapters + other.adapters)


@dataclass(frozen=True)
class TowerWork:
    """A vision tower's forward pass over one image.

    Args:
        forward: Operations, adapters included.
        first: Of these, those of the layer that reads pixels, which need no input gradient.
        adapters: Of these, those of LoRA factors.
        attention: Of these, those of attention, whose gradients cost twice as much.
        inputs: Of these, those of the first block's query, key and value projections, which need
            no input gradient where only adapters train.
    """

    forward: int
    first: int = 0
    adapters: int = 0
    attention: int = 0
    inputs: int = 0


@dataclass(frozen=True)
class ModelWork:
    """What of a model costs operations, and what of it trains.

    Args:
        inner: Decoder layers but the last.
        last_key_value: Key and value projection of the last layer.
        last_rest: The rest of the last layer.
        first_inputs: What reads the embeddings first (part of `inner`): the query, key and value
            projections of the first layer and the first factors of their adapters.
        attention_width: Query heads times head width.
        windows: Positions a token sees, layer by layer; None for all before it.
        head: Weights of the output head.
        connector: Weights of the connector's linear layers, in order.
        tower: The tower's pass over one image, or how it follows from the images' grids.
        tune: What trains.
        head_is_tied: The head is the embedding table and trains with the language model.
        connector_first: Which of the connector's layers have nothing that trains between them and
            the tower.
    """

    inner: Weights
    last_key_value: Weights
    last_rest: Weights
    first_inputs: int
    attention_width: int
    windows: tuple[int | None, ...]
    head: int
    connector: tuple[int, ...]
    tower: TowerWork | PatchTower
    tune: TuneConfig
    head_is_tied: bool = False
    connector_first: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class RowLengths:
    """What of a packed row decides its cost.

    Args:
        samples: Tokens of each sample.
        tails: Of these, how many from the first position that predicts a target to the end, for a
            model that computes its last layer only there; None for one that does not.
        num_targets: Target tokens.
        num_images: Images.
        num_image_tokens: Image tokens.
        pixel_shape: Shape of the images' pixels, for a tower that takes any size.
        image_shapes: What the layout says of every image, for such a tower.
    """

    samples: Sequence[int]
    num_targets: int
    num_images: int
    num_image_tokens: int
    tails: Sequence[int] | None = None
    pixel_shape: tuple[int, ...] = ()
    image_shapes: tuple[ImageShape, ...] = ()


@dataclass(frozen=True)
class Flops:
    """Operations of one row, forward and backward, by part."""

    tower: int
    connector: int
    language: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.tower + self.connector + self.language + self.attention + self.head


def row_flops(work: ModelWork, row: RowLengths) -> Flops:
    """Returns the operations a training step needs for one packed row; see the module."""
    tune = work.tune
    full = tune.language.mode == "full"
    below = tune.vision.mode != "freeze" or tune.connector.mode == "full"
    flows = below or tune.language.mode != "freeze"
    reaches_embeddings = below or full
    num_tokens = sum(row.samples)
    num_tail = num_tokens if row.tails is None else sum(row.tails)

    def products(weights: Weights, tokens: int) -> int:
        passes = 1 + flows + full
        return 2 * tokens * (passes * weights.base + 3 * weights.adapters)

    language = products(work.inner + work.last_key_value, num_tokens)
    language += products(work.last_rest, num_tail)
    if flows and not reaches_embeddings:
        language -= 2 * num_tokens * work.first_inputs
    tower, num_connector_tokens = _images(work, row)
    head_passes = 1 + flows + (tune.head.mode == "full" or (full and work.head_is_tied))
    return Flops(
        tower=tower,
        connector=_connector(work, num_connector_tokens),
        language=language,
        attention=(4 + 8 * flows) * work.attention_width * _pairs(work, row),
        head=2 * row.num_targets * work.head * head_passes,
    )


def _images(work: ModelWork, row: RowLengths) -> tuple[int, int]:
    """Returns the operations of the tower, and the tokens that pass the connector."""
    mode, tower = work.tune.vision.mode, work.tower
    if isinstance(tower, TowerWork):
        return row.num_images * _tower(tower, mode), row.num_image_tokens
    grids = tower.grids(row.pixel_shape, row.image_shapes) if row.pixel_shape else []
    passes = TowerWork(
        tower.forward(grids),
        tower.products(tower.first, grids, classes=False),
        tower.products(tower.adapters, grids),
        tower.attention(grids),
        tower.products(tower.inputs, grids),
    )
    return _tower(passes, mode), tower.num_connector_tokens(grids)


def _tower(tower: TowerWork, mode: str) -> int:
    if mode == "freeze":
        return tower.forward
    if mode == "full":
        return 3 * tower.forward - tower.first
    return 2 * tower.forward - tower.first + tower.adapters + tower.attention - tower.inputs


def _connector(work: ModelWork, num_tokens: int) -> int:
    tune, total = work.tune, 0
    tower_trains = tune.vision.mode != "freeze"
    trains = tune.connector.mode == "full"
    for index, weights in enumerate(work.connector):
        input_gradient = tower_trains or (trains and index not in work.connector_first)
        total += 2 * weights * num_tokens * (1 + input_gradient + trains)
    return total


def _pairs(work: ModelWork, row: RowLengths) -> int:
    """Pairs of query and key, summed over layers and samples."""
    *inner, last = work.windows
    total = sum(
        count * attended_pairs(length, queries=length, window=window)
        for window, count in Counter(inner).items()
        for length in row.samples
    )
    tails = row.samples if row.tails is None else row.tails
    lengths = zip(row.samples, tails, strict=True)
    return total + sum(attended_pairs(n, queries=tail, window=last) for n, tail in lengths)


def attended_pairs(length: int, *, queries: int, window: int | None = None) -> int:
    """Returns the keys seen by the last `queries` positions of a sample, summed.

    Args:
        length: Tokens of the sample.
        queries: Positions that ask, counted from its end.
        window: Keys a position sees at most, itself included.
    """

    def seen_up_to(n: int) -> int:
        if window is None or n <= window:
            return n * (n + 1) // 2
        return window * (window + 1) // 2 + (n - window) * window

    return seen_up_to(length) - seen_up_to(length - queries)


def work_of(model: nn.Module, tune: TuneConfig) -> ModelWork | None:
    """Reads from a model what its rows cost.

    Args:
        model: Adapters in place, before its layers are fused or quantised; may be on `meta`.
        tune: What trains.

    Returns:
        None for a model whose cost does not follow from its linear layers alone (several towers,
        experts, recurrent layers, query transformers): it is then not known rather than guessed.
    """
    if not isinstance(model, (ComposedVLM, NativeVLM)):
        return None
    layers = decoder_layers(model)
    if not layers or any(_has_other_products(layer) for layer in layers):
        return None
    if isinstance(model, NativeVLM) and model.family.is_recurrent:
        return None
    if isinstance(model, NativeVLM):
        tower: TowerWork | PatchTower | None = patch_tower(model)
        connector, first = connector_products(model)
    else:
        tower, first = _tower_work(model), frozenset({0})
        parts = model.connector.modules()
        connector = tuple(m.weight.numel() for m in parts if isinstance(m, nn.Linear))
    if tower is None:
        return None
    config: Any = model.config.get_text_config()
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    key_value = _weights(layers[-1], only=("k_proj", "v_proj"))
    whole = _weights(layers[-1])
    rest = Weights(whole.base - key_value.base, whole.adapters - key_value.adapters)
    inner = Weights()
    for layer in layers[:-1]:
        inner += _weights(layer)
    head = model.get_output_embeddings()
    return ModelWork(
        inner=inner,
        last_key_value=key_value,
        last_rest=rest,
        first_inputs=input_weights(layers[0]),
        attention_width=int(config.num_attention_heads) * int(head_width),
        windows=_windows(config, len(layers)),
        head=sum(p.numel() for p in head.parameters() if p.dim() > 1),
        connector=connector,
        tower=tower,
        tune=tune,
        head_is_tied=not model.module_map.head,
        connector_first=first,
    )


def _has_other_products(layer: nn.Module) -> bool:
    """Whether a layer has matrices outside of linear layers, such as stacked experts."""
    inside = {
        id(parameter)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    return any(p.dim() > 1 and id(p) not in inside for p in layer.parameters())


def _weights(module: nn.Module, *, only: Sequence[str] = ()) -> Weights:
    base = adapters = 0
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear) or (only and not set(only) & set(name.split("."))):
            continue
        if ".lora_" in f".{name}":
            adapters += part.weight.numel()
        else:
            base += part.weight.numel()
    return Weights(base, adapters)


def _windows(config: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class _Features(nn.Module):
    """A tower as one forward pass, so that its weights can be stood in for."""

    def __init__(self, tower: nn.Module, plan: TowerPlan) -> None:
        super().__init__()
        self.tower, self.plan = tower, plan

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        return tower_features(self.tower, self.plan, pixels_NCYX)


def _tower_work(model: ComposedVLM) -> TowerWork:
    """Counts a tower's pass over one image on the meta device: no weight is read or copied."""
    grid = model.grid
    side = grid.fixed_size_px or grid.patch_px * grid.downsample * 16
    wrapped = _Features(model.vision_tower, model.plan)
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*wrapped.named_parameters(), *wrapped.named_buffers())
    }
    dtype = next(model.vision_tower.parameters()).dtype
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=dtype)
    # The plain form of attention: its products are counted, those of a fused kernel may not be.
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        functional_call(wrapped, tensors, (pixels,))
    # A tower that sees an image at several scales runs over squares of the smallest.
    scales = model.plan.scales or (side,)
    num_squares = sum((scale // scales[0]) ** 2 for scale in scales)
    first = next((m for m in model.vision_tower.modules() if isinstance(m, nn.Conv2d)), None)
    first_flops = 0
    if first is not None:
        strides = first.stride if isinstance(first.stride, tuple) else (first.stride, first.stride)
        positions = (scales[0] // strides[0]) * (scales[0] // strides[1])
        first_flops = 2 * num_squares * first.weight.numel() * positions
    num_positions = (side // grid.patch_px) ** 2 + int(model.plan.traits.class_token)
    num_positions *= num_squares
    adapters = 2 * num_positions * _weights(model.vision_tower).adapters
    attention = int(counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0))
    blocks = largest_stack(model, "vision")
    inputs = 2 * num_positions * input_weights(blocks[0]) if blocks else 0
    return TowerWork(counter.get_total_flops(), first_flops, adapters, attention, inputs)
