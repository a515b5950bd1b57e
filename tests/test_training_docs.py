"""What docs/training.md shows is so, in both languages: recipes, keys, names, output."""

import io
import json
import re
import shlex
import sys
import typing
from pathlib import Path

import pytest
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from our_loop import recipe as bench_recipe
from test_readme import parse_only
from vistune.recipe import Recipe
from vistune.recipe.messages import sections_in
from vistune.recipe.schema import FreezeTune, LoraTune, TrainConfig
from vistune.train import train
from vistune.train.record import StepRecord

ROOT = Path(__file__).parents[1] / "docs"
PAGES = ("training.md", "training.zh-CN.md")
PAGE = (ROOT / PAGES[0]).read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def keys(section: type, prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        for inner in sections_in(field.annotation):
            found |= keys(inner, f"{prefix}{name}.")
    return found


def test_both_languages_show_the_same():
    other = (ROOT / PAGES[1]).read_text(encoding="utf-8")
    for kind in ("yaml", "bash", "text"):
        assert blocks(PAGE, kind) == blocks(other, kind) != []
    assert set(re.findall(r"`([\w.]+)`", PAGE)) == set(re.findall(r"`([\w.]+)`", other))


def test_recipes_shown_are_recipes():
    rest = {
        "name": "x",
        "model": {"vision_tower": {"path": "v"}, "language_model": {"path": "l"}},
        "data": {"train": [{"path": "d"}]},
        "batch": {"samples": 1},
        "train": {"steps": 1},
    }
    for text in blocks(PAGE, "yaml"):
        Recipe.model_validate({**rest, **yaml.safe_load(text)})


@pytest.mark.parametrize(
    "words", [shlex.split(b, comments=True) for b in "".join(blocks(PAGE, "bash")).splitlines()]
)
def test_commands_parse(words):
    parse_only(words[1:])


def test_every_key_named_exists():
    known = keys(Recipe)
    named = set(re.findall(r"`((?:train|batch|data|tune)\.[\w.]+)", PAGE))
    assert len(named) >= 10 and named <= known
    settings = re.findall(r"`((?:train|batch)\.\w+): (\{[^`]*\}|\w+)`", PAGE)
    for key, value in settings:
        section, _, name = key.partition(".")
        made = {"steps": 1, "checkpoint_layers": 1} if section == "train" else {"samples": 1}
        part = Recipe.model_fields[section].annotation
        part.model_validate(made | {name: yaml.safe_load(value)})
    assert len(settings) >= 5


def test_names_in_tables_are_all_there_are():
    rows = re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE)
    attention = typing.get_args(TrainConfig.model_fields["attention"].annotation)
    assert set(attention) <= set(rows)
    for tune in (FreezeTune, LoraTune):
        assert set(typing.get_args(tune.model_fields["frozen_format"].annotation)) <= set(rows)
    fields = set(StepRecord.__dataclass_fields__)
    assert {"mfu", "data_wait_frac", "padding_frac", "peak_memory_gib"} <= set(rows) & fields


def shape(line: str) -> str:
    """A line without its numbers and names."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+(e-\d+)?", "#", line)).strip()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tiny_llava import make

    folder = tmp_path_factory.mktemp("tiny")
    make(folder, num_samples=16)
    return folder


def test_a_run_prints_what_the_page_shows(tiny, tmp_path):
    made = bench_recipe(tiny, tmp_path / "r", "full", steps=3, batch={"samples": 4})
    said = io.StringIO()
    train(made, console=Console(file=said, width=80))
    # A tree of what trains and other rates stand between; every line of the page is printed so.
    printed = {shape(line).replace("/#", "") for line in said.getvalue().splitlines()}
    for line in "".join(blocks(PAGE, "text")).splitlines():
        if line.startswith(("device:", "checkpoint:")):
            assert any(p.startswith(line.split(":")[0]) for p in printed)
        else:
            assert shape(line).replace("/#", "") in printed, line
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    named = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`)? \| [a-z]", PAGE.partition("## Reading")[2], re.MULTILINE
    )
    assert {n for pair in named for n in pair if n} <= last.keys()
