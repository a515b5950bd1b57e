"""Attention of towers whose images lie end to end: every patch sees its image, or its window of it.

Transformers gives such a tower boundaries only where its attention has "flash" in its name, and
otherwise takes the images (and windows) apart and calls once for each. The name registered here has
it, so that all of a row's images are one call.
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
from vistune.models.attention.interface import refuse_unknown

_NAME = "vistune_patches_flash_"
_BOUNDARIES = frozenset({"cu_seq_lens_k", "max_length_k", "is_causal"})


def register_patch_attention(name: BackendName = "auto") -> str:
    """Makes a backend known to transformers (again is harmless) and returns its name there.

    Args:
        name: The backend; `auto` takes what suits each call.

    Raises:
        MissingExtraError: Its package is not installed.
    """
    registered = _NAME + name
    _compat.register_attention(registered, partial(patch_attention, backend=backend_of(name)))
    return registered


def is_patch_name(name: object) -> bool:
    """Whether a tower's attention was registered here."""
    return isinstance(name, str) and name.startswith(_NAME)


def patch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend = AUTO,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within each stretch of patches; no patch sees another image.

    Args:
        module: The attention module that asks.
        query: [1, H, P, D].
        key: [1, H, P, D].
        value: [1, H, P, D].
        attention_mask: None: boundaries say who sees whom.
        backend: How it is computed.
        cu_seq_lens_q: int [S + 1], the stretches' boundaries.
        max_length_q: Patches of the longest one.
        dropout: Probability of dropping a score.
        scaling: Factor on the scores; 1 / sqrt(D) when left out.
        kwargs: Whatever else the tower passes; anything that would change the result is refused.

    Returns:
        [1, P, H, D], and None in place of the weights.

    Raises:
        ModelError: The tower asks for something else.
    """
    refuse_unknown(module, {k: v for k, v in kwargs.items() if k not in _BOUNDARIES})
    if cu_seq_lens_q is None or attention_mask is not None or kwargs.get("is_causal"):
        raise ModelError(
            f"{type(module).__name__} does not attend within images by their boundaries",
            got="a mask, a causal order, or no boundaries",
        )
    query_THD, key_THD, value_THD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    edges = cu_seq_lens_q.to(query.device, torch.int32)
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else int(max_length_q)
    out_THD = attend(
        query_THD,
        key_THD,
        value_THD,
        Packing(edges, longest, causal=False),
        Scoring(scaling, None, None, dropout),
        backend=backend,
    )
    return out_THD.unsqueeze(0), None
