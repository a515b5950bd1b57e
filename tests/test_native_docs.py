"""What docs/native-models.md tells a reader to type is what the commands take; both languages."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models" / "native"))

from native_dirs import write_native

from test_readme import parse_only
from vistune.recipe import load_recipe, shipped_recipes
from vistune.train import train

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("native-models.md", "native-models.zh-CN.md")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_both_languages_show_the_same() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1]) and len(commands(PAGES[0])) > 8
    for language in ("yaml", "python"):
        english, chinese = (blocks(page, language) for page in PAGES)
        assert english == chinese and english


@pytest.mark.parametrize("words", commands(PAGES[0]), ids=" ".join)
def test_every_command_is_one_the_tools_take(words: list[str]) -> None:
    if words[0] == "vistune":
        parse_only(words[1:])
        if words[1] == "train" and not words[2].endswith(".yaml"):
            assert words[2] in shipped_recipes()
            load_recipe(words[2], words[3:])
    else:
        assert words[0] == "hf"  # the hub's own command


@pytest.mark.parametrize("number", range(2))
def test_the_recipes_shown_train(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = blocks(PAGES[0], "yaml")
    assert len(shown) == 2
    Path("shown.yaml").write_text(shown[number], encoding="utf-8")
    write_native("qwen2_5_vl", tmp_path / "models" / "Qwen2.5-VL-3B-Instruct")
    Path("images").mkdir()
    Image.new("RGB", (40, 60), (200, 30, 30)).save("images/a.png")
    turns = '[{"from": "human", "value": "<image>\\nwhat?"}, {"from": "gpt", "value": "red"}]'
    Path("train.json").write_text(f'[{{"id": "1", "image": "a.png", "conversations": {turns}}}]')
    settings = ["device=cpu", "data.workers=0", "batch.samples=1"]
    if number == 1:  # the tiny model has two layers
        settings.append("train.checkpoint_layers=2")
    recipe = load_recipe("shown.yaml", settings)
    result = train(recipe, console=Console(quiet=True))
    assert result.steps == 1 and (tmp_path / "runs" / recipe.recipe.name).is_dir()
    assert recipe.recipe.name in ("my-qwen", "my-qwen-full")
