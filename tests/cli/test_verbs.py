"""The verbs one after another on tiny weights: train, eval, chat, export, quickstart."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_parts import write_language, write_tower

from vistune.cli import main
from vistune.quickstart.datasets import BuiltDatasets
from vistune.quickstart.prepare import EmbeddedDefault
from vistune.quickstart.run import run_quickstart

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@dataclass(frozen=True)
class Desk:
    """A folder with tiny parts, data, a recipe, and a run of it."""

    root: Path
    recipe: Path
    run: Path
    task: Path
    image: Path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("desk")
    write_tower(root / "tower")
    write_language(root / "language")
    rows, questions = [], []
    for index in range(12):
        name, colour = f"{index}.png", list(COLOURS)[index % 2]
        Image.new("RGB", (28 + index, 28), COLOURS[colour]).save(root / name)
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(index), "image": name, "conversations": turns})
        question = {"id": index, "image": name, "question": "Colour?", "answers": [colour]}
        choice = {"choices": ["red", "blue"], "type": "choice"} if index > 8 else {}
        questions.append({**question, "type": "free", **choice})
    (root / "rows.json").write_text(json.dumps(rows))
    task = root / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, questions)))
    recipe = root / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "run_dir": str(root / "run"),
                "device": "cpu",
                "model": {
                    "vision_tower": {"path": str(root / "tower")},
                    "language_model": {"path": str(root / "language")},
                },
                "tune": {"language": {"mode": "lora", "rank": 2}},
                "data": {
                    "train": [{"path": str(root / "rows.json")}],
                    "template": "vicuna_v1",
                    "workers": 0,
                },
                "batch": {"max_tokens": 512, "samples": 4},
                "train": {"steps": 2},
                "log": {"tensorboard": False},
            }
        )
    )
    assert call("train", str(recipe)) == 0
    return Desk(root, recipe, root / "run", task, root / "0.png")


def call(*arguments: str) -> int:
    """Runs the command line in this process and returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["vistune", *arguments])
        main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_train_refuses_to_overwrite_and_resumes(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", str(desk.recipe)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("train", str(desk.recipe), "--resume") == 0


def test_check_counts_tokens(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "check", str(desk.recipe), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_ok"]) == (12, 12)
    assert found["num_image_tokens"] == 12 * 4
    assert call("data", "check", str(desk.recipe)) == 0
    assert "0 of 12 rows unusable" in capsys.readouterr().out


def test_preview_marks_what_is_learnt(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "preview", str(desk.recipe), "-n", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("‹image 1: 4 tokens›") == 2
    assert "⟦red" in printed.replace(" red", "red")
    page = desk.root / "preview.html"
    assert call("data", "preview", str(desk.recipe), "--html", str(page)) == 0
    assert page.read_text(encoding="utf-8").count("<section>") == 3


def test_a_moved_base_is_named_to_eval(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    output = desk.root / "moved-scores"
    arguments = ["eval", str(desk.run), str(desk.task), "--output", str(output), "--limit", "2"]
    arguments += ["--max-new-tokens", "2", "--baseline", str(desk.run)]
    place, away = desk.root / "language", desk.root / "away"
    place.rename(away)
    try:
        assert call(*arguments) == 2
        said = capsys.readouterr().err
        assert str(place) in said and "--language-model" in said
        assert call(*arguments, "--language-model", str(away)) == 0
    finally:
        away.rename(place)
    assert (output / "summary.json").is_file()


def test_eval_with_controls_and_baseline(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    output = desk.root / "scores"
    arguments = ["eval", str(desk.run), str(desk.task), "--output", str(output)]
    arguments += ["--max-new-tokens", "4", "--batch-size", "5", "--baseline", str(desk.run)]
    assert call(*arguments) == 0
    printed = capsys.readouterr().out
    assert "model - no image" in printed
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["rules"] == {"exact": 9, "choice": 3}
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len(results) == 12
    # The same weights give the same answers; the baseline here is the model itself.
    assert all(r["answers"]["model"] == r["answers"]["baseline"] for r in results)
    assert any(r["answers"]["model"] != r["answers"]["model_blind"] for r in results)
    assert {r["answers"]["model"] for r in results[9:]} <= {"red", "blue"}
    before = (output / "results.jsonl").stat().st_mtime_ns
    assert call(*arguments) == 0
    assert (output / "results.jsonl").stat().st_mtime_ns >= before
    assert call(*arguments, "--max-new-tokens", "5") == 2
    assert "other settings" in capsys.readouterr().err


def test_chat_answers_once_and_through_a_pipe(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--max-new-tokens", "6", "--device", "cpu"]
    asked = ["chat", str(desk.run), "--image", str(desk.image), "--prompt", "Colour?"]
    assert call(*asked, *short) == 0
    once = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {desk.image}\nColour?\n"))
    assert call("chat", str(desk.run), *short) == 0
    assert capsys.readouterr().out == once
    assert call(*asked[:2], "--image", str(desk.root / "none.png"), "--prompt", "x") == 2
    assert "there is no such image file" in capsys.readouterr().err


def test_chat_refuses_what_does_not_fit(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chat", str(desk.run), "--prompt", "x" * 300, "--device", "cpu") == 2
    assert "the model takes 256" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hf", "vistune", "llava", "xtuner"])
def test_an_export_says_what_to_run_next(
    desk: Desk, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    target = desk.root / f"an export to {form}"
    assert call("export", str(desk.run), "--to", form, "--output", str(target)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "vistune" and str(target) in arguments
    arguments[arguments.index("photo.jpg")] = str(desk.image)
    assert call(*arguments, "--prompt", "Colour?", "--max-new-tokens", "2") == 0
    assert capsys.readouterr().err.count("error") == 0


def test_an_exported_adapter_says_how_to_load_it(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from vistune.export import next_step

    target = desk.root / "adapter"
    assert call("export", str(desk.run), "--to", "adapter", "--output", str(target)) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next (in Python): ")
    names = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    found = eval(line, names)
    assert any("lora_A" in name for name, _ in found.named_parameters())
    # Of a whole model of transformers there is one adapter, on all of it.
    config = target / "language_model" / "adapter_config.json"
    (target / "adapter_config.json").write_text(config.read_text())
    whole = next_step(desk.run, to="adapter", output=target)
    assert "AutoModelForImageTextToText" in whole and f"{str(target)!r})" in whole


def test_an_export_answers_like_the_run(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    target = desk.root / "exported"
    assert call("export", str(desk.run), "--to", "vistune", "--output", str(target)) == 0
    capsys.readouterr()
    asked = ["--image", str(desk.image), "--prompt", "Colour?", "--max-new-tokens", "6"]
    answers = []
    for model in (desk.run, target):
        assert call("chat", str(model), *asked, "--device", "cpu") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert call("export", str(desk.run), "--to", "vistune", "--output", str(target)) == 2


def test_no_model_there(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chat", str(desk.root / "nothing"), "--prompt", "x") == 2
    assert "nothing" in capsys.readouterr().err


def tiny_default(desk: Desk) -> Callable[..., EmbeddedDefault]:
    datasets = BuiltDatasets(
        stage1=desk.root / "rows.json",
        stage2=desk.root / "rows.json",
        heldout=desk.task,
        images=desk.root,
        card=desk.root / "card.json",
        counts={"stage1_rows": 12, "stage2_rows": 12},
    )

    def prepare(cache: Path | None, *, say: Callable[[str], None]) -> EmbeddedDefault:
        say("prepared")
        return EmbeddedDefault(
            language_model=desk.root / "language",
            language_model_name="tiny",
            vision_tower=desk.root / "tower",
            datasets=datasets,
            notices=(),
            remarks=("a stand-in",),
        )

    return prepare


def test_quickstart_makes_everything_once(desk: Desk, tmp_path: Path) -> None:
    output = tmp_path / "quick start"
    overrides = (
        "train.epochs=null",
        "train.steps=2",
        "data.workers=0",
        "data.template=vicuna_v1",
        "log.tensorboard=false",
    )

    def start(**changes: object):  # type: ignore[no-untyped-def]
        return run_quickstart(
            output, overrides=overrides, prepare=tiny_default(desk), **changes  # type: ignore[arg-type]
        )  # fmt: skip

    first = start()
    assert first.is_complete
    assert first.summary is not None
    assert set(first.summary.systems) == {"model", "model_blind", "baseline", "prior"}
    page = first.report.read_text(encoding="utf-8")
    for part in ("a stand-in", "LoRA, rank", "after stage 1", "Stage 2: answering"):
        assert part in page
    checkpoints = sorted((output / "stage2" / "checkpoints").iterdir())
    written = [path.stat().st_mtime_ns for path in checkpoints]
    again = start()
    assert [path.stat().st_mtime_ns for path in checkpoints] == written
    assert again.summary == first.summary
    assert start(overwrite=True).is_complete
    assert [path.stat().st_mtime_ns for path in checkpoints] != written


def test_doctor_knows_the_versions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    assert call("doctor") == 0
    rows = {
        line.split("\t")[1]: line for line in capsys.readouterr().out.splitlines() if "\t" in line
    }
    assert rows["torch"].startswith("ok")
    assert metadata.version("transformers") in rows["transformers"]
    assert {"device", "threads", "disk here", "npm"} <= set(rows)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "4.0" if n == "transformers" else real(n))
    assert call("doctor") == 1
    assert "problem\ttransformers\t4.0, outside" in capsys.readouterr().out
