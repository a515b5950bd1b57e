"""Cross-entropy at the target positions, in float32, without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def target_nll(
    hidden_MD: torch.Tensor,
    target_ids_M: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk_targets: int,
) -> torch.Tensor:
    """Returns the negative log-likelihood of each target token.

    Beyond one chunk the logits of a chunk are recomputed in the backward pass: the head runs a
    second time over the target positions, which is under one percent of a step, and memory stays
    at one chunk whatever the vocabulary.

    Args:
        hidden_MD: Hidden states that predict the targets.
        target_ids_M: int64, the target tokens.
        logits: The model's head: [m, D] -> [m, V].
        chunk_targets: Targets per chunk.

    Returns:
        float32 [M], in nats.
    """
    num_targets = target_ids_M.shape[0]
    if num_targets <= chunk_targets:
        return _nll(hidden_MD, target_ids_M, logits)
    # preserve_rng_state: a head draws no random numbers.
    chunks = [
        checkpoint(_nll, hidden, ids, logits, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in zip(
            torch.split(hidden_MD, chunk_targets),
            torch.split(target_ids_M, chunk_targets),
            strict=True,
        )
    ]
    return torch.cat(chunks)


def _nll(
    hidden_MD: torch.Tensor,
    target_ids_M: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    return F.cross_entropy(logits(hidden_MD).float(), target_ids_M, reduction="none")
