"""Which channels of a frozen layer's inputs are large, found by running drawn tokens through it.

The large channels are the model's more than the data's: tokens drawn at random find nearly those of
real rows. So it needs no data, and a run that goes on finds the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vistune.models.attention import attend_packed
from vistune.models.fused.fp8 import largest_channels
from vistune.models.fused.layer import FusedLayer, layer_with_inputs

InputChannels: TypeAlias = dict[str, Tensor | None]
"""Of a layer: the names of its projections, and the channels of their inputs to hold twice."""

PROJECTIONS = ("qkv", "out", "gate_up", "down")
_NUM_TOKENS = 512


@torch.no_grad()
def channels_of(layers: Sequence[FusedLayer], decoder: Any, ops: ModuleType) -> list[InputChannels]:
    """Returns the large channels of every layer's inputs, adapters left out.

    Args:
        layers: The first layers of the decoder, none of them in FP8.
        decoder: The transformers decoder.
        ops: The elementwise kernels.
    """
    if not layers:
        return []
    table = decoder.get_input_embeddings()
    device = table.weight.device
    drawn = torch.Generator().manual_seed(0)
    ids_T = torch.randint(table.num_embeddings, (_NUM_TOKENS,), generator=drawn).to(device)
    edges = torch.tensor([0, _NUM_TOKENS], dtype=torch.int32, device=device)
    x_TD = table(ids_T).to(layers[0].norm1.weight.dtype)
    positions_BT = torch.arange(_NUM_TOKENS, device=device)[None]
    cos, sin = (t.squeeze(0) for t in decoder.rotary_emb(x_TD[None, :, :1].float(), positions_BT))
    found = []
    for layer in layers:
        attention = partial(
            attend_packed, cu_seqlens=edges, max_seqlen=_NUM_TOKENS, window=layer.scoring.window,
            scale=layer.scoring.scale, softcap=layer.scoring.softcap,
        )  # fmt: skip
        x_TD, inputs = layer_with_inputs(_bare(layer), x_TD, cos, sin, attention=attention, ops=ops)
        squares = {name: x_TI.float().square().mean(0) for name, x_TI in inputs.items()}
        found.append({name: largest_channels(square_I) for name, square_I in squares.items()})
    return found


def _bare(layer: FusedLayer) -> FusedLayer:
    return replace(
        layer, **{name: replace(getattr(layer, name), adapters=()) for name in PROJECTIONS}
    )
