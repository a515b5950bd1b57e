"""Rows of one length for compiled blocks: a last sample that nobody learns from and nobody sees."""

from __future__ import annotations

from dataclasses import replace

import torch

from vistune.types import Batch


def padded(row: Batch, num_tokens: int) -> Batch:
    """Fills a row up with one more sample of token id 0.

    It has neither targets nor an id, so that loss, gradients and counts stay what they were;
    attention keeps it apart from the others as it does them.

    Args:
        row: The row.
        num_tokens: Tokens it shall have; a row that has as many or more stays as it is.
    """
    missing = num_tokens - row.num_tokens
    if missing <= 0:
        return row
    device = row.input_ids_BT.device
    places = torch.arange(missing, device=device, dtype=row.position_ids_BT.dtype)
    places = places.expand(*row.position_ids_BT.shape[:-1], -1)
    ids = torch.zeros(1, missing, dtype=row.input_ids_BT.dtype, device=device)
    end = torch.tensor([num_tokens], dtype=row.cu_seqlens.dtype, device=device)
    # All of it counts as its prompt, where a model reads prompts both ways.
    prompts = (*row.prompt_lengths, missing) if row.prompt_lengths else ()
    return replace(
        row,
        prompt_lengths=prompts,
        input_ids_BT=torch.cat([row.input_ids_BT, ids], dim=-1),
        position_ids_BT=torch.cat([row.position_ids_BT, places], dim=-1),
        cu_seqlens=torch.cat([row.cu_seqlens, end]),
        max_seqlen=max(row.max_seqlen, missing),
    )
