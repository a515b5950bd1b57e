import io
import json
import random

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_fakes import FakeVLM

from vistune.errors import TrainingError
from vistune.train.hooks import ConsoleHook, MetricsHook, SampleAnswersHook, TensorBoardHook
from vistune.train.hooks.samples import Answer
from vistune.train.record import StepRecord


def record(step: int, loss: float = 2.5) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0.5,
        loss=loss,
        loss_per_source={"a": loss},
        target_tokens_per_source={"a": 8},
        tokens_per_source={"a": 20},
        samples_per_source={"a": 3},
        lr={"connector": 1e-3, "language": 2e-5},
        grad_norm=0.7,
        target_tokens=8,
        tokens=20,
        image_tokens=2,
        samples=3,
        tokens_per_s=1234.5,
        samples_per_s=9.0,
        tflop=None,
        useful_tflops=None,
        mfu=None,
        padding_frac=0.0,
        step_s=0.1,
        data_wait_s=0.01,
        data_wait_frac=0.1,
        peak_memory_gib=None,
        skipped_steps=0,
        rejected_rows=0,
    )


def test_metrics_line_is_on_disk_at_once(tmp_path):
    hook = MetricsHook(tmp_path / "metrics.jsonl")
    hook.on_record(record(1))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == 2.5 and line["peak_memory_gib"] is None
    assert line["lr"] == {"connector": 1e-3, "language": 2e-5}
    hook.close()


def test_tensorboard_files_are_read_back(tmp_path):
    hook = TensorBoardHook(tmp_path)
    hook.on_start(0)
    for step in (1, 2, 3):
        hook.on_record(record(step, loss=3.0 - step))
    hook.text("samples", "    what is this?", step=3)
    hook.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert "train/lr/connector" in seen.Tags()["scalars"]
    assert "train/peak_memory_gib" not in seen.Tags()["scalars"]  # not measured, not drawn
    assert seen.Tensors("samples")[0].tensor_proto.string_val[0] == b"    what is this?"


def test_tensorboard_restart_replaces_later_steps(tmp_path):
    first = TensorBoardHook(tmp_path)
    for step in (1, 2, 3):
        first.on_record(record(step, loss=1.0))
    first.close()
    second = TensorBoardHook(tmp_path)
    second.on_start(1)
    second.on_record(record(2, loss=5.0))
    second.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("train/loss")] == [(1, 1.0), (2, 5.0)]


def test_console_prints_first_and_last_step_without_a_terminal():
    console = Console(file=io.StringIO(), record=True, width=200)
    hook = ConsoleHook(console, total_steps=30, live=True)
    hook.on_start(0)
    for step in range(1, 31):
        hook.on_record(record(step))
        hook.on_step(step, last=step == 30)
    hook.close()
    lines = console.export_text().splitlines()
    assert [line.split()[1] for line in lines] == ["1/30", "30/30"]
    assert "loss 2.5000" in lines[0] and "data wait 10%" in lines[0] and "1,23" in lines[0]


def test_console_shows_a_bar_on_a_terminal():
    # The width of most terminals: numbers must not push out which step it is and what is left.
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    hook = ConsoleHook(console, total_steps=4, live=True)
    hook.on_start(1)
    hook.on_record(record(2))
    hook.on_step(2, last=False)
    hook.close()
    assert "2/4" in console.file.getvalue() and "loss 2.5000" in console.file.getvalue()


def test_sample_answers_disturb_nothing(tmp_path):
    model = FakeVLM(dropout=0.5)
    model.train()
    model.mix.eval()  # a frozen part
    asked: list[bool] = []

    def ask() -> list[Answer]:
        asked.append(model.dropout.training or torch.is_grad_enabled())
        torch.rand(3), np.random.rand(3), random.random()
        return [Answer("What is it?", "cat.png", "a cat\nor two"), Answer("Why?", None, "")]

    hook = SampleAnswersHook(
        ask,
        model=model,
        folder=tmp_path / "samples",
        every_steps=2,
        tensorboard=None,
        device=torch.device("cpu"),
    )
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    hook.on_start(0)
    for step in range(1, 6):
        hook.on_step(step, last=step == 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[2] and before[2] == random.getstate()
    assert model.dropout.training and not model.mix.training
    assert asked == [False] * 4
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step_{step:08d}.txt" for step in (0, 2, 4, 5)]
    text = (tmp_path / "samples" / "step_00000002.txt").read_text()
    assert "cat.png" in text and "What is it?" in text and "a cat\nor two" in text


def test_answers_that_do_not_fit_say_what_to_lower(tmp_path):
    def ask() -> list[Answer]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = SampleAnswersHook(
        ask,
        model=FakeVLM(),
        folder=tmp_path,
        every_steps=None,
        tensorboard=None,
        device=torch.device("cpu"),
    )
    with pytest.raises(TrainingError, match=r"sample questions(.|\n)*sample\.max_new_tokens"):
        hook.on_start(0)
