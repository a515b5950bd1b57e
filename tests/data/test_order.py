"""Steps are a pure function of lengths and seed, and hold every sample exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vistune.data.mix import Share, epoch_indices, epoch_sizes, grouped, spread
from vistune.data.order import EpochPlan, StepPlan, plan_epoch
from vistune.data.pack import Bounds, pack
from vistune.errors import DataError
from vistune.recipe import BatchConfig

LENGTHS = np.random.default_rng(3).integers(5, 400, 500).astype(np.int32)


def plan(batch: BatchConfig, **change: Any) -> EpochPlan:
    options = {"seed": 7, "epoch": 0, "shuffle": True, **change}
    lengths = options.pop("lengths", LENGTHS)
    return plan_epoch(lengths, batch, **options)


def samples_of(steps: Iterable[StepPlan]) -> list[int]:
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
    rows = pack(list(range(3000)), sizes, bounds=Bounds(4096))
    assert sorted(index for row in rows for index in row) == list(range(3000))
    # First fit in arrival order reaches about 0.90 here, best fit decreasing 0.949; ours 0.996.
    assert sum(sizes) / (len(rows) * 4096) > 0.985


def test_epochs_of_sources() -> None:
    def indices(epoch: int, *, shuffle: bool = True) -> list[int]:
        order = epoch_indices(
            [Share(10), Share(6, 2.0), Share(5, 0.4)], seed=0, epoch=epoch, shuffle=shuffle
        )
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
    part = epoch_indices([Share(4, 1.5)], seed=0, epoch=0, shuffle=False)
    assert part.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_plan_is_a_sequence_that_can_be_kept(tmp_path: Path) -> None:
    made = plan(BatchConfig(max_tokens=512, samples=16), world_size=3, rank=1)
    with (tmp_path / "p").open("wb") as file:
        made.save(file)
    again = EpochPlan.load(tmp_path / "p")
    assert again == made
    assert list(again) == list(made) == [*made[:5], *made.from_step(5)]
    assert again[-1] == made[len(made) - 1]
    assert made.max_rows == max(len(step.rows) for step in made)
    assert made.max_samples == max(sum(map(len, step.rows)) for step in made)
    with pytest.raises(IndexError):
        made[len(made)]
    assert list(EpochPlan.of([[(), (1,)], [(2, 3)]])) == [
        StepPlan(((), (1,))),
        StepPlan(((2, 3),)),
    ]


def test_every_window_holds_each_source_in_its_share() -> None:
    sizes = [7_000, 2_500, 500]
    order = epoch_indices([Share(n) for n in sizes], seed=1, epoch=0, shuffle=True)
    assert sorted(order.tolist()) == list(range(10_000))
    source = np.searchsorted(np.cumsum(sizes), order, side="right")
    for number, size in enumerate(sizes):
        held = np.concatenate([[0], np.cumsum(source == number)])
        for window in (20, 128, 1000):
            counts = held[window:] - held[:-window]
            # One sample too many or few at either end of the window, for each of the sources that
            # decide how far the window reaches.
            assert np.abs(counts - window * size / 10_000).max() <= 3
    assert not np.array_equal(
        order, epoch_indices([Share(n) for n in sizes], seed=1, epoch=1, shuffle=True)
    )


def test_spread_keeps_the_order_within_a_source() -> None:
    sources = [np.arange(50), np.arange(100, 103), np.zeros(0, dtype=np.int64)]
    mixed = spread(sources, np.random.default_rng(0))
    assert mixed[mixed < 100].tolist() == list(range(50))
    assert mixed[mixed >= 100].tolist() == [100, 101, 102]


def test_weights_and_caps_decide_how_many() -> None:
    assert epoch_sizes([Share(100, weight=3.0), Share(900, weight=1.0)]) == [750, 250]
    assert epoch_sizes([Share(100, weight=1.0), Share(0, weight=5.0)]) == [100, 0]
    assert epoch_sizes([Share(10, weight=1.0)] * 3) == [10, 10, 10]
    assert epoch_sizes([Share(7, weight=1.0), Share(3, weight=1.0)]) == [5, 5]
    assert epoch_sizes([Share(100, 2.0), Share(50, max_samples=20)]) == [200, 20]
    shares = [Share(100, weight=3.0), Share(900, weight=1.0)]
    seen = Counter(
        int(k)
        for epoch in range(4)
        for k in epoch_indices(shares, seed=0, epoch=epoch, shuffle=True)
    )
    # 3,000 of 100 samples, 1,000 of 900: every sample as often as any other, within one.
    assert {seen[k] for k in range(100)} == {30}
    assert {seen[k] for k in range(100, 1000)} == {1, 2}


def test_a_cap_goes_on_where_the_last_epoch_ended() -> None:
    shares = [Share(10, max_samples=5)]
    epochs = [
        set(epoch_indices(shares, seed=0, epoch=epoch, shuffle=True).tolist()) for epoch in (0, 1)
    ]
    assert epochs[0] | epochs[1] == set(range(10))


@pytest.mark.parametrize("by", ["length", "modality"])
def test_grouping_makes_steps_alike_and_loses_none(by: Any) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 2000, 5000).astype(np.int32)
    images = rng.random(5000) < 0.8
    order = rng.permutation(5000)
    options = {"by": by, "step_samples": 16, "seed": 3, "epoch": 0}
    found = grouped(order, lengths, images, **options)
    assert sorted(found.tolist()) == list(range(5000))
    assert np.array_equal(found, grouped(order, lengths, images, **options))
    steps = found[: 5000 // 16 * 16].reshape(-1, 16)
    spreads = np.ptp(lengths[steps], axis=1)
    random = np.ptp(lengths[order[: 5000 // 16 * 16].reshape(-1, 16)], axis=1)
    assert np.median(spreads) < np.median(random) / 10
    if by == "modality":
        assert np.mean([len(set(images[step])) == 1 for step in steps]) > 0.98
    first, second = lengths[steps[: len(steps) // 2]], lengths[steps[len(steps) // 2 :]]
    assert abs(first.mean() - second.mean()) < 150  # not sorted from one end to the other


def test_rows_keep_every_bound() -> None:
    rng = np.random.default_rng(0)
    images = rng.choice([0, 576, 1152], 400).astype(np.int32)
    lengths = images + rng.integers(20, 700, 400).astype(np.int32)
    batch = BatchConfig(max_tokens=4096, samples=50, max_image_tokens=1728, max_text_tokens=1500)
    made = plan(batch, lengths=lengths, image_tokens=images)
    assert sorted(samples_of(made)) == list(range(400))
    rows = [list(row) for step in made for row in step.rows]
    assert max(images[row].sum() for row in rows) <= 1728
    assert max((lengths[row] - images[row]).sum() for row in rows) <= 1500
    with pytest.raises(DataError, match="longer than a row") as caught:
        plan(
            BatchConfig(max_tokens=4096, samples=50, max_image_tokens=600),
            lengths=lengths,
            image_tokens=images,
        )
    assert caught.value.where == "batch.max_image_tokens"


def test_ranks_share_the_work_of_attention_too() -> None:
    # Long samples cost more than their tokens: rows of equal tokens, but unequal work.
    lengths = np.array([4096] * 8 + [128] * 256, dtype=np.int32)
    batch = BatchConfig(max_tokens=4096, samples=lengths.size)
    work = lengths + lengths.astype(float) ** 2 / 49_152
    loads = [
        sum(work[list(row)].sum() for step in made for row in step.rows)
        for made in (
            plan(batch, lengths=lengths, world_size=4, rank=rank, shuffle=False)
            for rank in range(4)
        )
    ]
    assert max(loads) / min(loads) < 1.001
