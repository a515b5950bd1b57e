"""Steps are a pure function of lengths and seed, and hold every sample exactly once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from vistune.data.order import StepPlan, epoch_indices, pack, plan_epoch
from vistune.errors import DataError
from vistune.recipe import BatchConfig

LENGTHS = np.random.default_rng(3).integers(5, 400, 500).astype(np.int32)


def plan(batch: BatchConfig, **change: Any) -> list[StepPlan]:
    options = {"seed": 7, "epoch": 0, "shuffle": True, **change}
    lengths = options.pop("lengths", LENGTHS)
    return plan_epoch(lengths, batch, **options)


def samples_of(steps: list[StepPlan]) -> list[int]:
    return [index for step in steps for row in step.rows for index in row]


BATCHES = [
    BatchConfig(max_tokens=512, samples=16),
    BatchConfig(max_tokens=512, samples=16, pack=False),
    BatchConfig(max_tokens=512, tokens=4096),
    BatchConfig(max_tokens=512, tokens=4096, pack=False),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_and_no_row_too_long(batch: BatchConfig, world_size: int) -> None:
    ranks = [plan(batch, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert sorted(index for steps in ranks for index in samples_of(steps)) == list(range(500))
    assert len({len(steps) for steps in ranks}) == 1
    for steps in zip(*ranks, strict=True):
        assert len({len(step.rows) for step in steps}) == 1  # ranks run equally many rows
    for steps in ranks:
        for step in steps:
            for row in step.rows:
                assert LENGTHS[list(row)].sum() <= batch.max_tokens
                assert batch.pack or len(row) <= 1


@pytest.mark.parametrize("batch", BATCHES)
def test_same_arguments_same_steps_and_a_new_order_every_epoch(batch: BatchConfig) -> None:
    assert plan(batch) == plan(batch)
    assert plan(batch) != plan(batch, epoch=1)
    assert plan(batch) != plan(batch, seed=8)
    assert plan(batch, shuffle=False) == plan(batch, shuffle=False, seed=8, epoch=5)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("pack_rows", [True, False])
def test_samples_step_k_holds_samples_k_times_n(world_size: int, pack_rows: bool) -> None:
    batch = BatchConfig(max_tokens=512, samples=16, pack=pack_rows)
    ranks = [
        plan(batch, world_size=world_size, rank=rank, shuffle=False) for rank in range(world_size)
    ]
    assert len(ranks[0]) == 32  # 500 / 16, rounded up: the last step holds the 4 that are left
    for k, steps in enumerate(zip(*ranks, strict=True)):
        held = sorted(index for step in steps for row in step.rows for index in row)
        assert held == list(range(16 * k, min(16 * k + 16, 500)))


def test_unpacked_rows_keep_the_order() -> None:
    batch = BatchConfig(max_tokens=512, samples=16, pack=False)
    assert samples_of(plan(batch, shuffle=False)) == list(range(500))


def test_steps_of_tokens_are_as_near_as_whole_rows_allow() -> None:
    for world_size in (1, 2):
        batch = BatchConfig(max_tokens=512, tokens=4096)
        ranks = [plan(batch, world_size=world_size, rank=rank) for rank in range(world_size)]
        totals = [
            sum(int(LENGTHS[list(row)].sum()) for step in steps for row in step.rows)
            for steps in zip(*ranks, strict=True)
        ]
        assert all(abs(total - 4096) <= 512 * world_size / 2 for total in totals[:-1])


def test_fewer_samples_than_ranks_gives_empty_rows() -> None:
    batch = BatchConfig(max_tokens=512, samples=2)
    ranks = [
        plan(batch, lengths=LENGTHS[:3], world_size=4, rank=rank, shuffle=False)
        for rank in range(4)
    ]
    assert [len(step.rows) for steps in ranks for step in steps] == [1] * 8
    assert sorted(samples_of([step for steps in ranks for step in steps])) == [0, 1, 2]


def test_ranks_carry_about_equal_loads_in_every_step() -> None:
    batch = BatchConfig(max_tokens=2048, samples=256)
    lengths = np.tile(LENGTHS, 8)
    ranks = [plan(batch, lengths=lengths, rank=rank, world_size=4) for rank in range(4)]
    for steps in list(zip(*ranks, strict=True))[:-1]:
        loads = [sum(int(lengths[list(row)].sum()) for row in step.rows) for step in steps]
        assert max(loads) - min(loads) <= 2048  # at most one row apart


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match="longer than a row"):
        plan(BatchConfig(max_tokens=64, samples=4))


def test_packing_wastes_little() -> None:
    # Text lengths of an instruction mix with 576 image tokens each, at 4,096 tokens a row.
    rng = np.random.default_rng(0)
    sizes = (576 + np.exp(rng.normal(np.log(170), 0.85, 3000)).clip(16, 1400)).astype(int).tolist()
    rows = pack(list(range(3000)), sizes, max_tokens=4096)
    assert sorted(index for row in rows for index in row) == list(range(3000))
    # First fit in arrival order reaches about 0.90 here, best fit decreasing 0.949; ours 0.996.
    assert sum(sizes) / (len(rows) * 4096) > 0.985


def test_epochs_of_sources() -> None:
    def indices(epoch: int, *, shuffle: bool = True) -> list[int]:
        order = epoch_indices([10, 6, 5], [1.0, 2.0, 0.4], seed=0, epoch=epoch, shuffle=shuffle)
        return [int(k) for k in order]

    counts = Counter(indices(0))
    assert all(counts[k] == 1 for k in range(10))
    assert all(counts[k] == 2 for k in range(10, 16))
    assert sum(counts[k] for k in range(16, 21)) == 2  # 0.4 of 5
    # Five epochs of 0.4 go round twice: every row is seen equally often.
    seen = Counter(k for epoch in range(5) for k in indices(epoch) if k >= 16)
    assert set(seen.values()) == {2}
    assert len(seen) == 5
    assert indices(0) != indices(1)
    assert indices(1, shuffle=False) == [*range(10), *range(10, 16), *range(10, 16), 18, 19]
    part = epoch_indices([4], [1.5], seed=0, epoch=0, shuffle=False)
    assert part.tolist() == [0, 1, 2, 3, 0, 1]
