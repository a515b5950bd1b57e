"""Samples end to end in one packed row, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vistune.types import Batch, EncodedSample, Rejected, Tail


def pack_row(
    samples: Sequence[EncodedSample],
    *,
    rejected: Sequence[Rejected] = (),
    read_s: float = 0.0,
) -> Batch:
    """Packs samples into one row.

    A row whose samples all failed still stands for a forward pass: it holds one token (id 0), no
    sample and no target.

    Args:
        samples: The samples, in order.
        rejected: Samples planned for this row that could not be read.
        read_s: Seconds spent making the row.

    Returns:
        The row. The label shift is done: `target_index_M` says where a hidden state predicts a
        target, `target_ids_M` which token that is. A sample's first token is never a target.
    """
    lengths = [int(sample.input_ids.size) for sample in samples] or [1]
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([sample.input_ids for sample in samples] or [np.zeros(1, np.int64)])
    positions = np.arange(ids.size, dtype=np.int64) - np.repeat(edges[:-1], lengths)
    mask = np.concatenate([sample.target_mask for sample in samples] or [np.zeros(1, np.bool_)])
    mask[edges[:-1]] = False
    targets = np.flatnonzero(mask)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    pixels = [image for sample in samples for image in sample.pixel_values]
    return Batch(
        input_ids_BT=torch.from_numpy(ids.astype(np.int64, copy=False)).unsqueeze(0),
        position_ids_BT=torch.from_numpy(positions).unsqueeze(0),
        cu_seqlens=torch.from_numpy(edges),
        max_seqlen=max(lengths),
        target_index_M=torch.from_numpy(targets.astype(np.int64) - 1),
        target_ids_M=torch.from_numpy(ids[targets]),
        target_sample_M=torch.from_numpy(owner[targets]),
        pixel_values_NCYX=torch.from_numpy(np.stack(pixels)) if pixels else None,
        sample_ids=tuple(sample.id for sample in samples),
        sources=tuple(sample.source for sample in samples),
        num_image_tokens=sum(sample.num_image_tokens for sample in samples),
        rejected=tuple(rejected),
        read_s=read_s,
    )


def tail_of(row: Batch) -> Tail:
    """Returns where the last layer of a row is read; see `types.Tail`.

    Args:
        row: A row in CPU memory with at least one target.
    """
    edges = row.cu_seqlens.numpy().astype(np.int64)
    targets, owner = row.target_index_M.numpy(), row.target_sample_M.numpy()
    first = edges[1:].copy()
    np.minimum.at(first, owner, targets)
    lengths = edges[1:] - first
    runs = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(runs[-1]) - np.repeat(runs[:-1], lengths) + np.repeat(first, lengths)
    return Tail(
        index_U=torch.from_numpy(index),
        cu_seqlens=torch.from_numpy(runs.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        target_index_M=torch.from_numpy(targets - first[owner] + runs[:-1][owner]),
    )
