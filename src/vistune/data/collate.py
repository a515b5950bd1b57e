"""Samples end to end in one packed row, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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
    positions_BT = _positions(samples, positions)
    mask = np.concatenate([sample.target_mask for sample in samples] or [np.zeros(1, np.bool_)])
    mask[edges[:-1]] = False
    targets = np.flatnonzero(mask)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    return Batch(
        input_ids_BT=torch.from_numpy(ids.astype(np.int64, copy=False)).unsqueeze(0),
        position_ids_BT=torch.from_numpy(positions_BT),
        cu_seqlens=torch.from_numpy(edges),
        max_seqlen=max(lengths),
        target_index_M=torch.from_numpy(targets.astype(np.int64) - 1),
        target_ids_M=torch.from_numpy(ids[targets]),
        target_sample_M=torch.from_numpy(owner[targets]),
        pixel_values_NCYX=stack_pixels(samples),
        sample_ids=tuple(sample.id for sample in samples),
        sources=tuple(sample.source for sample in samples),
        num_image_tokens=sum(sample.num_image_tokens for sample in samples),
        rejected=tuple(rejected),
        read_s=read_s,
        image_shapes=tuple(shape for sample in samples for shape in sample.image_shapes),
        prompt_lengths=tuple(s.prompt_tokens for s in samples if s.prompt_tokens is not None),
    )


def stack_pixels(samples: Sequence[EncodedSample]) -> torch.Tensor | None:
    """Returns the tower's inputs of all samples in one tensor, or None where there is no image."""
    pixels = [image for sample in samples for image in sample.pixel_values]
    if not pixels:
        return None
    laid_out = any(sample.image_shapes for sample in samples)
    return torch.from_numpy(np.concatenate(pixels) if laid_out else np.stack(pixels))


def _positions(
    samples: Sequence[EncodedSample], plain_T: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns positions [1, T], or [A, 1, T] where the samples bring their own."""
    own = [sample.position_ids for sample in samples if sample.position_ids is not None]
    if not own:
        return plain_T[None]
    assert len(own) == len(samples)
    return np.concatenate(own, axis=1)[:, None]


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
