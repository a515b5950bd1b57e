"""Rates come out as their formulas say, and unknown ones as None."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_loop import metrics, resolved
from train_fakes import CPU, make_row

from vistune.models.flops import RowLengths
from vistune.recipe.sizes import optimizer_bytes
from vistune.train import train
from vistune.train.fit import TrainResult
from vistune.train.record import Clock, Totals
from vistune.train.report import print_result
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
        assert line.tflop is None and line.useful_tflops is None and line.mfu is None
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
    for line in lines:
        assert line["mfu"] == pytest.approx(line["useful_tflops"] / result.peak_tflops)
        assert line["tflop"] == pytest.approx(line["useful_tflops"] * line["step_s"])
    assert sum(line["tflop"] for line in lines) == pytest.approx(result.totals.flops / 1e12)
    assert result.totals.steps == 3
    assert result.totals.tokens == sum(line["tokens"] for line in lines)
    summary = said.getvalue()[said.getvalue().index("done: ") :].splitlines()
    assert [line.split(":")[0] for line in summary] == [
        *("done", "speed", "compute", "lost to", "memory", "checkpoint")
    ]
    # A path may be as long as it is; everything else fits a terminal.
    assert all(len(line) <= 80 for line in summary[:-1])
    assert "useful tokens/s" in summary[1] and "samples/s" in summary[1]
    assert "useful TFLOP/s" in summary[2] and "MFU" in summary[2] and "measured" in summary[2]
    assert "data wait" in summary[3] and "padding 0.0%" in summary[3]
    assert summary[5].endswith("step_00000003")


def test_the_summary_of_a_large_run_fits_a_terminal_too(tmp_path):
    totals = Totals(
        seconds=360_000.0,
        wait_s=12.3,
        steps=5_198,
        tokens=1_234_567_890,
        samples=12_345_678,
        flops=219_123 * 10**15,
        computed_tokens=1_234_999_999,
        padding_tokens=1_000,
    )
    result = TrainResult(
        run_dir=tmp_path,
        checkpoint=tmp_path / "[red]",
        steps=5_198,
        total_steps=5_198,
        first_loss=12.3456,
        final_loss=0.1234,
        seconds=360_000.0,
        skipped_steps=0,
        rejected_rows=0,
        totals=totals,
        peak_tflops=787.6,
        peak_memory_gib=123.4,
    )
    said = io.StringIO()
    print_result(result, Console(file=said, width=80), total_steps=5_198)
    lines = said.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    assert "MFU 77.3% of 788 measured" in lines[2] and lines[-1].endswith("/[red]")
    stopped = io.StringIO()
    early = replace(result, interrupted_by="SIGINT", steps=9)
    print_result(early, Console(file=stopped, width=80), total_steps=5_198)
    assert "stopped by SIGINT after step 9 of 5198" in stopped.getvalue()
    assert "--resume" in stopped.getvalue() and "useful tokens/s" in stopped.getvalue()


def test_the_optimizer_state_reserved_is_the_state_there_will_be():
    weights = [torch.nn.Parameter(torch.randn(64, 32)), torch.nn.Parameter(torch.randn(32))]
    optimizer = torch.optim.AdamW(weights)
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    assert sum(t.nbytes for t in moments) == optimizer_bytes(64 * 32 + 32, "adamw")
