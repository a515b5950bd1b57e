"""Bytes that a decoder's layers keep and make for each token of a row: by formula or by counting.

The fused layers keep their own tensors, so they have a formula; layers as transformers wrote them
are run on tensors without storage, and what autograd keeps of them is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vistune.models.kept import kept_slope, peak_slope
from vistune.models.probes import PlannedModel, attention_bytes, decoder_probe, repeated_bytes
from vistune.recipe import TuneConfig

_PROBE_TOKENS = (64, 128)
_PEAK_TOKENS = (2048, 4096)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer for each token of a row.

    Args:
        kept: Kept for the backward pass.
        kept_recomputed: Kept when the layer is computed again.
        backward: Made while its backward pass runs.
    """

    kept: float
    kept_recomputed: float
    backward: float


@dataclass(frozen=True)
class DecoderBytes:
    """Bytes of a decoder for each token of a row.

    Args:
        layer: Of a layer that is not the last.
        tail_kept: Kept by the last layer for each token.
        tail_kept_target: And for each position it is computed at.
        row: Outside of layers (ids, rotary tables, embeddings).
    """

    layer: LayerBytes
    tail_kept: float
    tail_kept_target: float
    row: float


def fused_bytes(
    config: Any, layer: nn.Module, *, tune: TuneConfig, dtype: torch.dtype
) -> DecoderBytes:
    """Returns what `models.fused` keeps and makes; names as in its `_Saved`.

    Args:
        config: The language model's config.
        layer: One of its layers, adapters in place.
        tune: What trains.
        dtype: Format of activations.
    """
    b = dtype.itemsize
    width, inner = int(config.hidden_size), int(config.intermediate_size)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    head_width = int(getattr(config, "head_dim", None) or width // heads)
    query, key_value = heads * head_width, 2 * kv_heads * head_width
    ranks = sum(
        int(part.weight.shape[0])
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear) and ".lora_A" in name
    )
    rstd, lse = 4, 4 * heads
    queries_padded, keys_padded = _padded_bytes(head_width, heads, kv_heads, dtype=dtype)
    repeated = repeated_bytes(config, dtype=dtype)
    mlp = b * (width + 2 * inner) + rstd  # h, gate_up
    names = {name for name, _ in layer.named_children()}
    sandwich = 2 * (b * width + 4) if "post_feedforward_layernorm" in names else 0
    raw = b * (query + key_value) if hasattr(layer.self_attn, "q_norm") else 0
    # x, q k v, attended; heads before their norms, results before theirs; and key heads once for
    # each query head where the kernel wants them so
    kept = b * (width + 2 * query + key_value + ranks) + repeated + rstd + lse + mlp
    kept += sandwich + raw + queries_padded + keys_padded
    full = tune.language.mode == "full"
    fp8 = tune.language.mode != "full" and tune.language.frozen_format == "fp8"
    # Backward through the MLP: gradient of the output, of the active inner values, and where they
    # are wanted, those values again and the FP8 form of the gradient of gate and up.
    through_mlp = b * (width + inner + (inner if ranks or full else 0)) + (2 * inner if fp8 else 0)
    # Through attention: three gradients of the row's width, those of q, k, v, and the flash
    # kernel's fp32 sums for q. Dropped inputs of adapters come to no more: in the MLP the gradient
    # of the active values is gone by then, in attention those sums are.
    through_attention = b * (3 * width + query + key_value) + repeated + 4 * query + 2 * lse
    return DecoderBytes(
        layer=LayerBytes(kept, b * width, max(through_mlp, through_attention)),
        tail_kept=b * (width + key_value) + repeated + rstd + keys_padded,
        tail_kept_target=b * (width + 2 * query + ranks) + rstd + lse + mlp + queries_padded,
        # ids and positions (8 each), cos and sin (as wide as the embeddings' numbers), the mask of
        # image tokens and their places
        row=16 + 2 * head_width * (4 if full else b) + 9,
    )


def _padded_bytes(
    head_width: int, heads: int, kv_heads: int, *, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes for each token of heads copied to a width the kernel takes, a multiple of 8.

    Returns:
        Of queries and results, and of keys and values; none where the width is one already.
    """
    if head_width % 8 == 0 or dtype is torch.float32:
        return 0, 0
    each = 2 * dtype.itemsize * (head_width + -head_width % 8)
    return each * heads, each * kv_heads


def counted_bytes(
    model: PlannedModel,
    layers: Sequence[nn.Module],
    *,
    tune: TuneConfig,
    dtype: torch.dtype,
) -> DecoderBytes:
    """Counts what autograd keeps of the decoder as it was written, and makes on its way back.

    Args:
        model: Tuned, of tensors without storage, stand-ins for kernels in place.
        layers: Its decoder layers.
        tune: What trains.
        dtype: Format of activations.
    """
    width = int(model.config.get_text_config().hidden_size)
    model.train()
    below = tune.connector.mode == "full" or tune.vision.mode != "freeze"
    stream = torch.float32 if tune.language.mode == "full" else dtype
    run = decoder_probe(model, stream=stream, below=below)
    kept = kept_slope(model, run, dtype=dtype, at=_PROBE_TOKENS)
    most = peak_slope(model, run, dtype=dtype, at=_PEAK_TOKENS)
    each = kept / len(layers) + attention_bytes(model, dtype=dtype)
    wide = stream.itemsize
    return DecoderBytes(
        layer=LayerBytes(each, wide * width, max(0.0, most - kept)),
        tail_kept=each,
        tail_kept_target=0.0,
        row=16 + 9 + wide * width,
    )
