"""A run over two weighted sources: exact shares in every step, losses and tokens that add up."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from test_loop import metrics, resolved

from vistune.errors import DeviceError
from vistune.train import train


@pytest.fixture
def mixture(tiny: Path, tmp_path: Path) -> dict:
    """`common` is three quarters of the mixture, `rare` one; a row of each is broken."""
    rows = json.loads((tiny / "train.json").read_text()) * 4
    common, rare = (json.loads(json.dumps(part)) for part in (rows[::2], rows[1::2]))
    rare[3]["image"] = "gone.png"
    common[0]["image"] = "gone.png"
    for name, part in (("common", common), ("rare", rare)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    sources = [
        {"path": str(tmp_path / f"{name}.json"), "images": str(tiny / "images"), "weight": weight}
        for name, weight in (("common", 3.0), ("rare", 1.0))
    ]
    return {"train": sources, "shuffle": True, "max_dropped_frac": 0.1}


@pytest.mark.parametrize("batch", [{"samples": 4}, {"samples": 8, "max_tokens": 300}])
def test_every_step_holds_every_source_in_its_share(tiny, tmp_path, mixture, batch):
    said = io.StringIO()
    recipe = resolved(tiny, tmp_path / "run", data=mixture, batch=batch, train={"steps": 11})
    train(recipe, console=Console(file=said, width=200))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 12))
    seen = {"common": 0, "rare": 0}
    for line in lines:
        for total, parts in (
            ("samples", "samples_per_source"),
            ("tokens", "tokens_per_source"),
            ("target_tokens", "target_tokens_per_source"),
        ):
            assert line[total] == sum(line[parts].values()) > 0
        assert line["samples"] == batch["samples"]
        targets, loss = line["target_tokens_per_source"], line["loss_per_source"]
        mean = sum(targets[name] * loss[name] for name in loss) / line["target_tokens"]
        assert line["loss"] == pytest.approx(mean, rel=1e-6)
        for name in seen:
            seen[name] += line["samples_per_source"][name]
        # Whatever the window, never more than one sample off.
        assert seen["rare"] == pytest.approx(sum(seen.values()) / 4, abs=1)
    printed = [line for line in said.getvalue().splitlines() if line.startswith("source ")]
    for line, name in zip(printed, ("common", "rare"), strict=True):
        learnt = sum(entry["target_tokens_per_source"][name] for entry in lines)
        nll = sum(
            entry["target_tokens_per_source"][name] * entry["loss_per_source"].get(name, 0.0)
            for entry in lines
        )
        share = f"{seen[name] / sum(seen.values()):.2%}"
        assert line.startswith(f"source {name}: {seen[name]} samples ({share}), ")
        assert line.endswith(f"{learnt:,} learnt from, mean loss {nll / learnt:.4f}")


def test_totals_count_steps_between_two_lines(tiny, tmp_path, mixture):
    said = io.StringIO()
    recipe = resolved(
        tiny, tmp_path / "run", data=mixture, train={"steps": 6}, log={"every_steps": 4}
    )
    result = train(recipe, console=Console(file=said, width=200))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 6]
    sources = result.totals.sources
    assert sum(source.samples for source in sources.values()) == result.totals.samples == 24
    assert sum(source.tokens for source in sources.values()) == result.totals.tokens


def test_one_source_is_not_listed(tiny, tmp_path):
    said = io.StringIO()
    train(resolved(tiny, tmp_path / "run", train={"steps": 1}), console=Console(file=said))
    assert "source " not in said.getvalue()


def test_several_processes_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="2 processes were started"):
        train(resolved(tiny, tmp_path / "run"), console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
