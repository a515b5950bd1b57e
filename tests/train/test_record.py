"""Rates come out as their formulas say, and unknown ones as None."""

import io

import torch
from rich.console import Console
from test_loop import metrics, resolved
from train_fakes import CPU, make_row

from vistune.models.flops import RowLengths
from vistune.recipe.sizes import optimizer_bytes
from vistune.train import train
from vistune.train.record import Clock, Totals
from vistune.train.state import Progress
from vistune.train.step import StepSums
from vistune.train.work import lengths_of, row_cost


def sums(rows):
    return StepSums(
        num_targets=sum(r.num_targets for r in rows),
        nll_per_source={"main": 1.0},
        targets_per_source={"main": 1},
        tokens_per_source={"main": sum(r.num_tokens for r in rows)},
        samples_per_source={"main": sum(r.num_samples for r in rows)},
        grad_norm=1.0,
        num_samples=sum(r.num_samples for r in rows),
        num_tokens=sum(r.num_tokens for r in rows),
        num_image_tokens=1,
    )


def record(clock, rows):
    return clock.record(sums(rows), Progress(), lr={}, device=CPU, samples_per_epoch=10)


def test_rates_are_amounts_over_the_same_time():
    rows = [make_row((7, 4), seed=0), make_row((9,), seed=1)]
    clock = Clock(lambda row: row.num_tokens * 10**12, peak_tflops=40.0)
    clock.pause(-2.0)  # two seconds ago
    clock.wait_s = 0.5
    clock.add(sums(rows), rows)
    line = record(clock, rows)
    # 20 tokens at 1 TFLOP each; the clock itself runs on a little
    assert abs(line.step_s - 2.0) < 0.5
    assert line.tokens_per_s == 20 / line.step_s
    assert abs(line.useful_tflops - 20 / line.step_s) < 1e-9
    assert abs(line.mfu - line.useful_tflops / 40) < 1e-12
    assert abs(line.data_wait_frac - 0.5 / line.step_s) < 1e-9
    assert line.padding_frac == 0.0
    assert clock.done.tokens == 20 and clock.done.flops == 20 * 10**12


def test_what_is_not_known_is_none_and_stays_so_in_sums():
    rows = [make_row((7,), seed=0)]
    clock = Clock(None, peak_tflops=40.0)
    for _ in range(2):
        clock.add(sums(rows), rows)
        line = record(clock, rows)
        assert line.useful_tflops is None and line.mfu is None
    assert clock.done.flops is None and clock.done.steps == 2 and clock.done.tokens == 14
    assert Totals().per_s(3) is None


def test_lengths_of_a_row():
    row = make_row((7, 4), seed=0)  # targets follow positions 3, 4, 5 and 7 + 2
    assert lengths_of(row, reads_tail=True) == RowLengths(
        samples=[7, 4],
        tails=[4, 2],
        num_targets=4,
        num_images=1,
        num_image_tokens=1,
        pixel_shape=tuple(row.pixel_values_NCYX.shape),
    )
    assert lengths_of(row, reads_tail=False).tails is None
    assert row_cost(None, reads_tail=True) is None
    assert torch.equal(row.target_index_M, torch.tensor([3, 4, 5, 9]))


def test_a_run_reports_what_it_achieved(tiny, tmp_path):
    recipe = resolved(tiny, tmp_path / "r", train={"steps": 3})
    said = io.StringIO()
    result = train(recipe, console=Console(file=said, width=400))
    lines = metrics(tmp_path / "r")
    assert all(line["useful_tflops"] > 0 and line["padding_frac"] == 0.0 for line in lines)
    assert all(line["mfu"] is None for line in lines)  # the peak of a CPU is not measured
    assert result.totals.steps == 3
    assert result.totals.tokens == sum(line["tokens"] for line in lines)
    assert "useful tokens/s" in said.getvalue() and "useful TFLOP/s" in said.getvalue()


def test_the_optimizer_state_reserved_is_the_state_there_will_be():
    weights = [torch.nn.Parameter(torch.randn(64, 32)), torch.nn.Parameter(torch.randn(32))]
    optimizer = torch.optim.AdamW(weights)
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    assert sum(t.nbytes for t in moments) == optimizer_bytes(64 * 32 + 32, "adamw")
