"""Attention over packed rows, registered for every transformers model, one name for each backend.

A packed row's mask is not a mask: its place is taken by an int32 tensor that holds `cu_seqlens`,
which transformers hands to each layer untouched. A decoder that drops it cannot mix samples up
quietly, because no attention function is called without it. Nothing of size T x T is made.
Padded batches (generation) go through torch's SDPA as transformers does it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention.auto import AUTO, BackendName, attend, backend_of
from vistune.models.attention.contract import Backend, Packing, Scoring
from vistune.models.attention.per_sample import masked, repeat_heads

PACKED_ATTENTION = "vistune_packed"
"""The name under which each call takes the backend that suits it."""
_NAMES: dict[BackendName, str] = {
    "auto": PACKED_ATTENTION,
    "varlen": "vistune_packed_varlen",
    "cudnn": "vistune_packed_cudnn",
    "sdpa": "vistune_packed_each",
    # transformers treats names with "flash" and "flex" in them in ways of its own.
    "flex": "vistune_packed_blocks",
    "npu": "vistune_packed_npu",
    "flash_attn": "vistune_packed_fa",
}
_ROWS = "vistune_rows_"
# What decoders pass along that does not change the result of attention.
_HARMLESS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "use_cache",
    }
)


def register_packed_attention(name: BackendName = "auto", *, opaque: bool = False) -> str:
    """Makes a backend known to transformers (again is harmless) and returns its name there.

    Args:
        name: The backend; `auto` takes what suits each call.
        opaque: Keep torch's compiler out of it, for layers that are compiled around it.

    Raises:
        MissingExtraError: Its package is not installed.
    """
    attention = partial(packed_attention, backend=backend_of(name))
    registered = _NAMES[name] + ("_opaque" if opaque else "")
    _compat.register_attention(registered, _compat.opaque(attention) if opaque else attention)
    return registered


def register_row_attention(name: BackendName) -> str:
    """As `register_packed_attention`, for a vision tower: a batch of rows of one length each."""
    registered = _ROWS + _NAMES[name]
    _compat.register_attention(registered, partial(row_attention, backend=backend_of(name)))
    return registered


def is_packed_name(name: object) -> bool:
    """Whether attention registered under a name keeps the samples of packed rows apart."""
    return isinstance(name, str) and name.removesuffix("_opaque") in _NAMES.values()


def packing_mask(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Returns what stands in for the attention mask of a packed row.

    Args:
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample; carried as a size, so that reading it never waits
            for the device.

    Returns:
        int32 [1, 1, max_seqlen, S + 1], a view without memory of its own.
    """
    row = cu_seqlens.to(torch.int32).view(1, 1, 1, -1)
    return row.expand(1, 1, max_seqlen, -1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend = AUTO,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within samples when the mask is a packing mask, as SDPA otherwise.

    Args:
        module: The attention module that asks.
        query: [B, H, T, D].
        key: [B, H_kv, T', D].
        value: [B, H_kv, T', D].
        attention_mask: A packing mask, a boolean mask, or None for plain causal attention.
        backend: How packed rows are computed.
        dropout: Probability of dropping a score.
        scaling: Factor on the scores; 1 / sqrt(D) when left out.
        sliding_window: Positions a token sees, itself included.
        softcap: Scores are squashed into (-softcap, softcap).
        is_causal: Given by some decoders; packed rows are always causal.
        kwargs: Whatever else the decoder passes; anything that would change the result is refused.

    Returns:
        [B, T, H, D], and None in place of the weights.

    Raises:
        ModelError: The decoder asks for something a packed row cannot do.
    """
    refuse_unknown(module, kwargs)
    if attention_mask is None or attention_mask.dtype is not torch.int32:
        scoring = Scoring(scaling, None, softcap, dropout)
        return _plain(module, query, key, value, attention_mask, scoring, is_causal), None
    one_way = is_causal is not False and bool(getattr(module, "is_causal", True))
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not one_way:
        raise ModelError(
            f"{type(module).__name__} does not attend as a packed row needs",
            got=f"queries {tuple(query.shape)}, keys {tuple(key.shape)}, causal {one_way}",
            expected="one row, no key-value cache, causal attention",
        )
    query_THD, key_THD, value_THD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out_THD = attend(
        query_THD,
        key_THD,
        value_THD,
        Packing(attention_mask[0, 0, 0], attention_mask.shape[2]),
        Scoring(scaling, sliding_window, softcap, dropout),
        backend=backend,
    )
    return out_THD.unsqueeze(0), None


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses what a decoder passes along that would change the result of attention.

    Args:
        module: The attention module that asks.
        kwargs: What it passes beside the arguments that are known.

    Raises:
        ModelError: There is such a thing.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} wants attention that packed rows do not offer",
            got=", ".join(unknown),
            fix="use another language model",
        )


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a vision tower: every image sees all of itself, and images are equally long.

    Args:
        module: The attention module that asks.
        query: [N, H, P, D].
        key: [N, H, P, D].
        value: [N, H, P, D].
        attention_mask: None; a mask (towers that pad) is left to transformers' SDPA.
        backend: How it is computed.
        dropout: Probability of dropping a score.
        scaling: Factor on the scores; 1 / sqrt(D) when left out.
        is_causal: Towers that say so are left to transformers' SDPA.
        kwargs: See `packed_attention`.

    Returns:
        [N, P, H, D], and None in place of the weights.
    """
    refuse_unknown(module, kwargs)
    one_way = bool(is_causal) or (is_causal is None and bool(getattr(module, "is_causal", False)))
    if attention_mask is not None or one_way:
        scoring = Scoring(scaling, None, None, dropout)
        return _plain(module, query, key, value, attention_mask, scoring, is_causal), None
    num_rows, _, length, _ = query.shape
    edges = torch.arange(num_rows + 1, dtype=torch.int32, device=query.device) * length
    query_THD, key_THD, value_THD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out_THD = attend(
        query_THD,
        key_THD,
        value_THD,
        Packing(edges, length, causal=False),
        Scoring(scaling, None, None, dropout),
        backend=backend,
    )
    return out_THD.view(num_rows, length, *out_THD.shape[1:]), None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    is_causal: bool | None,
) -> Tensor:
    """Attention of a batch, as transformers' SDPA; torch's SDPA has no cap, so that is written."""
    if scoring.softcap is None:
        out, _ = _compat.sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=scoring.dropout,
            scaling=scoring.scale,
            is_causal=is_causal,
        )
        assert isinstance(out, Tensor)
        return out
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    if mask is None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        seen = seen.tril(num_keys - num_queries)
    else:
        seen = mask[..., : key.shape[2]]
    return masked(query, key, value, seen, scoring).transpose(1, 2).contiguous()
