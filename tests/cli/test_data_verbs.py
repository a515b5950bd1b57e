"""`vistune data preview`, `stats` and `convert` on datasets named without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vistune.cli import main


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    lines = []
    for k, image in enumerate(("a.png", "none.png", "a.png")):
        turns = [{"from": "human", "value": "<image>\n什么?"}, {"from": "gpt", "value": "猫"}]
        lines.append(json.dumps({"id": k, "image": image, "conversations": turns}))
    path.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["vistune", "data", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_preview(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "preview", "rows.jsonl", "-n", "2") == 0
    printed = capsys.readouterr()
    assert "assistant: ⟦猫⟧" in printed.out
    assert "none.png: the image is not there" in printed.err
    assert call(monkeypatch, "preview", "rows.jsonl", "-o", "p.html") == 0
    page = (rows.parent / "p.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 2
    assert "the image is not there" in page
    assert "<svg" in page
    assert call(monkeypatch, "preview", "rows.jsonl", "train.lr=1") == 2
    assert "key=value needs a recipe" in capsys.readouterr().err


def test_stats(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "stats", "rows.jsonl", "--plot", "s.svg") == 0
    printed = capsys.readouterr().out
    assert "rows\t3\t2\t1" in printed
    assert "image width, px\t40" in printed
    assert "image_missing\t1" in printed
    assert (rows.parent / "s.svg").stat().st_size > 1000
    assert call(monkeypatch, "stats", "rows.jsonl", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["distributions"]["characters per row"]["max"] == len("\n什么?猫")


def test_convert(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "convert", "rows.jsonl", "o.jsonl", "--to", "messages") == 0
    assert "3 of 3 rows written" in capsys.readouterr().out
    assert call(monkeypatch, "convert", "rows.jsonl", "c.csv", "--to", "captions_csv") == 0
    assert call(monkeypatch, "convert", "rows.jsonl", "o.tar", "--to", "webdataset") == 2
    assert "1  row: unusable, image_missing: " in capsys.readouterr().err
    assert not (rows.parent / "o.tar").exists()
    arguments = ("convert", "rows.jsonl", "o.tar", "--to", "webdataset", "--allow-loss", "--json")
    assert call(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["num_written"] == 2
    assert call(monkeypatch, "stats", "o.tar", "--format", "webdataset") == 0
    assert (
        call(monkeypatch, "convert", "o.tar", "d", "--from", "webdataset", "-t", "cogvlm_sft") == 0
    )
    assert len(list((rows.parent / "d" / "labels").iterdir())) == 2
