"""A packed row is its samples end to end, and the label shift is done."""

from __future__ import annotations

import numpy as np
import torch

from vistune.data.collate import pack_row
from vistune.types import EncodedSample, Rejected


def sample(name: str, ids: list[int], mask: list[int], images: int = 0) -> EncodedSample:
    return EncodedSample(
        id=name,
        source=f"of {name}",
        input_ids=np.array(ids, dtype=np.int64),
        target_mask=np.array(mask, dtype=np.bool_),
        pixel_values=[np.full((3, 2, 2), k, dtype=np.float32) for k in range(images)],
        num_image_tokens=5 * images,
    )


def test_pack_row() -> None:
    lost = Rejected("s", "w", "x", "image_missing", "detail", "fix")
    rows = [sample("a", [10, 11, 12], [1, 0, 1], 2), sample("b", [20, 21], [1, 1], 1)]
    batch = pack_row(rows, rejected=[lost], read_s=0.5)
    assert batch.input_ids_BT.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    # The first token of a sample is predicted by nothing, whatever its mask says.
    assert batch.target_index_M.tolist() == [1, 3]
    assert batch.target_ids_M.tolist() == [12, 21]
    assert batch.target_sample_M.tolist() == [0, 1]
    assert batch.pixel_values_NCYX is not None
    assert batch.pixel_values_NCYX.shape == (3, 3, 2, 2)
    assert batch.pixel_values_NCYX[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert (batch.sample_ids, batch.sources) == (("a", "b"), ("of a", "of b"))
    assert (batch.num_image_tokens, batch.num_tokens, batch.num_targets) == (15, 5, 2)
    assert (batch.rejected, batch.read_s) == ((lost,), 0.5)


def test_the_samples_are_left_as_they_were() -> None:
    row = sample("a", [1, 2], [1, 1])
    pack_row([row])
    assert row.target_mask.tolist() == [True, True]


def test_a_row_of_nothing_is_one_token_without_a_target() -> None:
    batch = pack_row([])
    assert batch.input_ids_BT.tolist() == [[0]]
    assert (batch.num_targets, batch.num_samples, batch.max_seqlen) == (0, 0, 1)
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.pixel_values_NCYX is None
    assert batch.target_index_M.dtype == torch.int64
