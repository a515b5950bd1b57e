"""Runs compared step by step: numbers worked out by hand, files that are none, the verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vistune.cli import main
from vistune.compare import compare_runs, read_curve
from vistune.errors import DataError

LOSSES = [4.0, 2.0, 1.0, 0.5, 0.5]


def write_run(folder: Path, losses: list[float], **others: list[float]) -> Path:
    folder.mkdir()
    lines = []
    for index, loss in enumerate(losses):
        record = {"step": index + 1, "loss": loss, "target_tokens": 10, "tokens": 30, "step_s": 2.0}
        lines.append(json.dumps(record | {key: values[index] for key, values in others.items()}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_residuals_by_hand(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    b = write_run(tmp_path / "b", [4.0, 2.2, 0.9, 0.5, 0.6], step_s=[9.0, 9.0, 9.0, 1.0, 1.5])
    found = compare_runs(a, b)
    assert found.residuals == pytest.approx((0.0, 0.1, -0.1, 0.0, 0.2))
    assert found.mean_error == pytest.approx(0.08)
    assert found.mean_residual == pytest.approx(0.04)
    assert found.worst == (5, pytest.approx(0.2))
    assert found.end_residual == pytest.approx(0.2)
    # The first three steps are no measure of time: 1.25 s against 2 s.
    assert found.step_time_ratio == pytest.approx(0.625)
    assert found.other_data_at is None


def test_a_run_equals_itself(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [0.0, *LOSSES])
    found = compare_runs(a, a / "metrics.jsonl")
    assert (found.mean_error, found.worst[1], found.step_time_ratio) == (0.0, 0.0, 1.0)


def test_only_common_steps_count_and_other_data_is_seen(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    b = write_run(tmp_path / "b", LOSSES[:3], target_tokens=[10, 11, 10])
    found = compare_runs(a, b)
    assert (len(found.steps), found.num_only_a, found.num_only_b) == (3, 2, 0)
    assert found.other_data_at == 2


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 7.0}\n')
    assert [point.loss for point in read_curve(a)] == [4.0, 7.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no step"),
        ("{broken", "not the record"),
        ('{"step": 1}', "not the record"),
        ('{"step": 1, "loss": NaN}', "not a number"),
    ],
)
def test_files_that_are_no_metrics(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        read_curve(tmp_path)


def test_no_metrics_and_no_common_step(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    with pytest.raises(DataError, match="cannot be read"):
        compare_runs(a, tmp_path / "nowhere")
    b = write_run(tmp_path / "b", LOSSES, step=[11, 12, 13, 14, 15])
    with pytest.raises(DataError, match="no step in common"):
        compare_runs(a, b)


def run_verb(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vistune", "compare", "runs", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    b = write_run(tmp_path / "b", [loss * 1.01 for loss in LOSSES])
    picture = tmp_path / "new" / "curves.png"
    assert run_verb(str(a), str(b), "--tolerance", "0.02", "--plot", str(picture)) == 0
    out = capsys.readouterr().out
    assert "mean relative error of the loss\t1.000%" in out
    assert "time of a step, B / A\t1.000" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run_verb(str(a), str(b), "--tolerance", "0.005") == 1
    assert "NOT within" in capsys.readouterr().out
    assert run_verb(str(a), str(b), "--plot", str(tmp_path / "curves.txt")) == 2


def test_other_data_fails_a_tolerance(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", LOSSES)
    b = write_run(tmp_path / "b", LOSSES, tokens=[30, 30, 31, 30, 30])
    assert run_verb(str(a), str(b), "--tolerance", "1") == 1


def test_comparing_runs_needs_no_torch() -> None:
    code = "import sys, vistune.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
