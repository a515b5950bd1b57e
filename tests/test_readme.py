"""What the READMEs tell a newcomer to type is what the commands take, in both languages."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from vistune.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_both_languages_give_the_same_commands_and_recipes():
    english, chinese = (commands(name) for name in READMES)
    assert english == chinese
    recipes = [
        [re.sub(r"#.*", "", block).split() for block in blocks(name, "yaml")] for name in READMES
    ]
    assert recipes[0] == recipes[1]
    assert len(english) > 12


@pytest.mark.parametrize("words", commands("README.md"), ids=" ".join)
def test_every_command_is_one_the_tools_take(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "vistune":
        parse_only(words[1:])
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[-1]).group(1).split(",")
        known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", known, flags=re.MULTILINE) for extra in extras)
    else:
        assert words[0] in ("python3", "pytest")


def parse_only(words: list[str]) -> None:
    """Parses a command line as the program would, without running it."""
    from vistune.cli.app import app

    command, path, context = typer.main.get_command(app), "vistune", None
    while hasattr(command, "resolve_command"):
        # A group parses its own options and hands the rest on.
        context = command.make_context(path, words, parent=context)
        rest = [*context._protected_args, *context.args]
        path, command, words = command.resolve_command(context, rest)
    command.make_context(path, words, parent=context)


def test_an_option_that_does_not_exist_would_be_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse_only(["train", "x.yaml", "--resum"])


def test_the_recipe_shown_is_a_recipe(tmp_path):
    (shown,) = blocks("README.md", "yaml")
    file = tmp_path / "shown.yaml"
    file.write_text(shown, encoding="utf-8")
    assert load_recipe(str(file)).recipe.name == "my-vlm-stage1"


def test_shipped_recipes_named_are_shipped():
    named = {word for words in commands("README.md") for word in words if word.startswith("llava-")}
    assert named
    assert named <= set(shipped_recipes())
