"""`vistune data check` on single files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no")
    entries = []
    for index, (image, answer) in enumerate(
        [("good.png", "猫"), ("broken.png", "x"), ("none.png", "x"), ("good.png", " ")]
    ):
        turns = [{"from": "human", "value": "<image>\n什么?"}, {"from": "gpt", "value": answer}]
        entries.append({"id": f"row{index}", "image": image, "conversations": turns})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


COMMAND = (sys.executable, "-m", "vistune", "data", "check")


def check(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, path.name, "--images", "images", *arguments],
        cwd=path.parent,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_unusable_rows_are_counted_named_and_put_aside(rows: Path) -> None:
    done = check(rows)
    assert done.returncode == 1, done.stderr
    lines = {line.split("\t")[0]: line.split("\t") for line in done.stdout.splitlines()}
    assert lines["rows"][1] == "4"
    assert lines["usable"][1] == "1"
    assert lines["image_unreadable"][1:3] == ["1", "row1"]
    assert lines["image_missing"][1:3] == ["1", "row2"]
    assert lines["empty_answer"][1] == "1"
    aside = (rows.parent / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in aside] == [
        "image_unreadable",
        "image_missing",
        "empty_answer",
    ]


def test_a_clean_file_passes_and_writes_nothing(rows: Path) -> None:
    entries = json.loads(rows.read_text(encoding="utf-8"))
    rows.write_text(json.dumps(entries[:1]), encoding="utf-8")
    done = check(rows, "--json", "--deep")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == {
        "format": "llava",
        "path": "rows.json",
        "rows": 1,
        "usable": 1,
        "images": 1,
        "turns": 2,
        "by_reason": {},
        "notes": {},
        "note_rows": {},
        "scripts": {"chinese": 1},
    }
    assert not (rows.parent / "quarantine.jsonl").exists()


def test_overrides_belong_to_recipes(rows: Path) -> None:
    done = check(rows, "train.lr=1")
    assert done.returncode == 2
    assert "key=value needs a recipe" in done.stderr


def test_a_broken_file_is_an_error_with_its_place(rows: Path) -> None:
    rows.write_text('[{"id": 1},\n {"id"', encoding="utf-8")
    done = check(rows)
    assert done.returncode == 2
    assert "rows.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_processes_of_a_recipe_are_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "llava-1.5/7b-pretrain", "--workers", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "data.workers=2" in done.stderr
