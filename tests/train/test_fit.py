import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from train_fakes import FakeData, resolved_recipe, run

from vistune.checkpoint.load import list_checkpoints
from vistune.errors import CheckpointError, DataError, NonFiniteError, TrainingError
from vistune.train import fit as fit_module
from vistune.train.fit import num_steps
from vistune.types import Rejected


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_run_learns_and_writes_everything(tmp_path):
    result = run(resolved_recipe(tmp_path / "r", train={"steps": 30, "schedule": "constant"}))
    seen = losses(tmp_path / "r")
    assert [step for step, *_ in seen] == list(range(1, 31))
    assert result.final_loss == seen[-1][1]
    # Random tokens cannot be predicted, but the start is worse than knowing nothing.
    assert seen[-1][1] < seen[0][1]
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[3])
    assert line["target_tokens"] == 3 + 1 + 4 and line["tokens"] == 20 and line["samples"] == 3
    assert line["peak_memory_gib"] > 0.05  # of the whole process, torch included
    assert 0 <= line["data_wait_frac"] <= 1 and line["step_s"] > 0
    kept = [path.name for path in list_checkpoints(tmp_path / "r" / "checkpoints")]
    assert kept == ["step_00000030", "step_00000028", "step_00000026"]
    weights = load_file(result.checkpoint / "weights.safetensors")
    assert set(weights) == {
        "connector.weight",
        "connector.bias",
        "embedding.weight",
        "mix.weight",
        "mix.bias",
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_equals_no_interruption_bit_for_bit(tmp_path, dropout):
    run(resolved_recipe(tmp_path / "whole"), dropout=dropout)
    whole = losses(tmp_path / "whole")
    # Stop by a signal after step 5, when the newest periodic checkpoint is of step 4.
    recipe = resolved_recipe(tmp_path / "parts")

    class Stopping(FakeData):
        def steps(self, start_step):
            for number, rows in enumerate(super().steps(start_step), start_step):
                if number == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield rows

    result = run(recipe, dropout=dropout, data=Stopping())
    assert result.interrupted_by == "SIGTERM" and result.steps == 5
    assert losses(tmp_path / "parts") == whole[:5]
    assert run(recipe, resume=True, dropout=dropout).steps == 8
    assert losses(tmp_path / "parts") == whole
    same = [
        load_file(tmp_path / d / "checkpoints/step_00000008/weights.safetensors")
        for d in ("whole", "parts")
    ]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_resume_without_the_random_state_would_differ(tmp_path):
    """The test above is not vacuous: with dropout, the losses depend on the generator's state."""
    run(resolved_recipe(tmp_path / "a"))
    run(resolved_recipe(tmp_path / "b", seed=1))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


_CHILD = """
import sys, time
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from train_fakes import FakeData, resolved_recipe, run

class Slow(FakeData):
    def steps(self, start_step):
        for rows in super().steps(start_step):
            time.sleep(0.01)
            yield rows

run(resolved_recipe(Path({folder!r}), train={train!r}), resume={resume!r}, data=Slow())
"""


def test_resume_after_sigkill_at_any_moment(tmp_path):
    """A process is really killed, at a moment that differs from run to run."""
    train = {"steps": 40, "schedule": "cosine", "warmup_frac": 0.1}
    run(resolved_recipe(tmp_path / "whole", train=train))
    folder = tmp_path / "killed"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _CHILD.format(
                here=str(Path(__file__).parent), folder=str(folder), train=train, resume=False
            ),
        ]
    )
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep((time.time_ns() // 1000 % 300) / 1000)  # 0 to 0.3 s: somewhere in the 40 steps
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    run(resolved_recipe(folder, train=train), resume=True)
    assert losses(folder) == losses(tmp_path / "whole")


def test_lines_after_the_checkpoint_are_cut_on_resume(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    run(recipe)
    whole = losses(tmp_path / "r")
    # As if killed after step 8, with the checkpoint of step 8 not yet there and a torn last line.
    for path in list_checkpoints(tmp_path / "r" / "checkpoints")[:1]:
        (path / "COMPLETE").unlink()
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    console = Console(file=io.StringIO(), record=True, width=200)
    run(recipe, resume=True, console=console)
    lines = console.export_text().splitlines()
    assert losses(tmp_path / "r") == whole
    assert any("step_00000008" in line and "damaged" in line for line in lines)
    assert any("the one before" in line and "step_00000006" in line for line in lines)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    run(recipe)
    whole = losses(tmp_path / "r")
    weights = tmp_path / "r/checkpoints/step_00000008/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    console = Console(file=io.StringIO(), record=True, width=200)
    result = run(recipe, resume=True, console=console)
    text = console.export_text()
    assert "step_00000008/weights.safetensors" in text and "sha256" in text
    assert "the one before" in text
    assert losses(tmp_path / "r") == whole and result.steps == 8


def test_a_finished_run_says_so(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    run(recipe)
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    result = run(recipe, resume=True)
    assert result.steps == 8 and result.first_loss is None
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before


def test_rehearsal_of_the_heaviest_steps_leaves_no_trace(tmp_path):
    seen: list[int] = []

    class Watched(FakeData):
        def steps(self, start_step=0):
            seen.append(start_step)
            return super().steps(start_step)

    run(resolved_recipe(tmp_path / "a"))
    said = Console(file=io.StringIO(), width=200)
    heavy = {5: "the row with most image tokens", 2: "the longest row"}
    run(resolved_recipe(tmp_path / "b"), data=Watched(), rehearsals=heavy, console=said)
    assert seen == [5, 2, 0]
    assert "rehearsed: the row with most image tokens, the longest row" in said.file.getvalue()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_out_of_memory_says_when_and_what_to_turn(tmp_path, monkeypatch):
    def too_much(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(fit_module, "backward_step", too_much)
    with pytest.raises(TrainingError, match="at step 1") as caught:
        run(resolved_recipe(tmp_path / "a"))
    assert "batch.max_tokens (4096)" in str(caught.value) and "11 tokens" in str(caught.value)
    with pytest.raises(TrainingError, match="rehearsing the longest row, before the first step"):
        run(resolved_recipe(tmp_path / "b"), rehearsals={3: "the longest row"})


def test_a_real_allocation_that_fails_is_explained(tmp_path, monkeypatch):
    # Not a stand-in: the CPU's own allocator is asked for more than any machine has.
    def too_much(*args, **options):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(fit_module, "backward_step", too_much)
    with pytest.raises(TrainingError, match="ran out of memory at step 1") as caught:
        run(resolved_recipe(tmp_path / "a", tune={"vision": {"mode": "full"}}))
    assert "train.checkpoint_layers (0)" in str(caught.value)
    assert "batch.max_image_tokens" in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(fit_module, "backward_step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(resolved_recipe(tmp_path / "a"))


def test_changed_recipe_is_refused_by_key(tmp_path):
    run(resolved_recipe(tmp_path / "r"))
    changed = resolved_recipe(
        tmp_path / "r",
        train={"steps": 9, "schedule": "cosine", "warmup_frac": 0.2, "lr": 2e-3},
        log={"every_steps": 3},
    )
    with pytest.raises(CheckpointError) as caught:
        run(changed, resume=True)
    message = str(caught.value)
    assert "2 keys differ" in message
    assert "train.lr: 0.001 -> 0.002" in message and "train.steps: 8 -> 9" in message
    assert "log.every_steps" not in message


def test_a_constant_schedule_may_be_made_longer(tmp_path):
    def recipe(folder, steps):
        train = {"steps": steps, "schedule": "constant", "warmup_frac": 0.0}
        return resolved_recipe(tmp_path / folder, train=train)

    run(recipe("long", 9))
    run(recipe("short", 4))
    run(recipe("short", 9), resume=True)
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_other_data_is_refused(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    run(recipe)
    with pytest.raises(CheckpointError, match="data or the number format"):
        run(recipe, resume=True, data=FakeData(num_samples=13))


def test_directory_with_a_run_is_not_overwritten_silently(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    with pytest.raises(CheckpointError, match="no run to resume"):
        run(recipe, resume=True)
    run(recipe)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(recipe)
    (tmp_path / "r" / "mine.txt").write_text("kept")
    run(recipe, overwrite=True)
    assert len(losses(tmp_path / "r")) == 8
    assert (tmp_path / "r" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 6), (2.0, 12), (0.5, 3), (0.1, 1), (1.5, 9), (2.6, 16)]
)
def test_epochs_become_steps(tmp_path, epochs, steps):
    recipe = resolved_recipe(tmp_path, train={"epochs": epochs}).recipe
    assert num_steps(recipe, FakeData()) == steps


def test_nonfinite_stops_before_the_optimizer_step(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    with pytest.raises(NonFiniteError) as caught:
        run(recipe, data=FakeData(poison=frozenset({5})))
    message = str(caught.value)
    assert "step 6" in message and "10-0, 10-1, 11-0" in message and "train.lr" in message
    assert [step for step, *_ in losses(tmp_path / "r")] == [1, 2, 3, 4, 5]
    newest = list_checkpoints(tmp_path / "r" / "checkpoints")[0]
    assert newest.name == "step_00000004"


def test_nonfinite_skip_skips_the_schedule_too(tmp_path):
    train = {"steps": 8, "nonfinite": "skip", "max_skipped_steps": 2}
    recipe = resolved_recipe(tmp_path / "r", train=train)
    result = run(recipe, data=FakeData(poison=frozenset({2, 5})), dropout=0.0)
    assert result.skipped_steps == 2 and result.steps == 8
    seen = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in seen] == list(range(1, 9))
    assert all(math.isfinite(line["loss"]) for line in seen)
    run(resolved_recipe(tmp_path / "plain", train=train), dropout=0.0)
    plain = [
        json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["lr"] for line in seen] == [line["lr"] for line in plain]
    assert [line["loss"] for line in seen[:2]] == [line["loss"] for line in plain[:2]]
    skipped = [json.loads(line) for line in (tmp_path / "r/skipped.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["data_step"]) for entry in skipped] == [(3, 3), (5, 6)]
    assert skipped[0]["sample_ids"] == ["4-0", "4-1", "5-0"]


def test_too_many_skipped_steps_stop(tmp_path):
    train = {"steps": 8, "nonfinite": "skip", "max_skipped_steps": 1}
    with pytest.raises(NonFiniteError, match="after 1 skipped"):
        run(resolved_recipe(tmp_path / "r", train=train), data=FakeData(poison=frozenset({2, 5})))


def test_row_that_fails_while_training_is_counted_or_stops(tmp_path):
    row = Rejected("main", "d.json row 3", "x3", "image_damaged", "cut short", "replace it")
    with pytest.raises(DataError, match=r"d\.json row 3"):
        run(resolved_recipe(tmp_path / "strict"), data=FakeData(rejected={2: (row,)}))
    lenient = resolved_recipe(
        tmp_path / "lenient", data={"train": [{"path": "d.json"}], "max_dropped_frac": 0.1}
    )
    # The same row in a later epoch is one row, not two.
    result = run(lenient, data=FakeData(rejected={2: (row,), 6: (row,)}))
    assert result.rejected_rows == 1
    assert json.loads((tmp_path / "lenient/quarantine.jsonl").read_text())["id"] == "x3"


def test_two_processes_cannot_share_a_directory(tmp_path):
    recipe = resolved_recipe(tmp_path / "r")
    run(recipe)

    class Intruder(FakeData):
        def steps(self, start_step):
            with pytest.raises(CheckpointError, match="another process"):
                run(recipe, overwrite=True)
            return super().steps(start_step)

    run(recipe, overwrite=True, data=Intruder())
