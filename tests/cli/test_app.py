"""The command line as a process: speed of start, messages, exit codes, pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pydantic", "yaml", "numpy", "PIL", "rich.progress", "jinja2")


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", **changes}
    return subprocess.run(
        [sys.executable, "-m", "vistune", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=env,
        timeout=120,
        check=False,
    )


def imported(*arguments: str) -> set[str]:
    code = (
        "import sys\nfrom vistune.cli import main\n"
        f"sys.argv = ['vistune', *{list(arguments)!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    assert not imported("--help") & set(HEAVY)
    # Newer Typer imports pydantic itself to parse a verb's arguments.
    assert not imported("train", "--help") & (set(HEAVY) - {"pydantic"})


def test_a_recipe_error_imports_neither_torch_nor_transformers() -> None:
    assert not imported("train", "nowhere.yaml") & {"torch", "transformers", "numpy", "PIL"}


def test_version_and_help() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "vistune")
    text = run("--help").stdout
    for verb in ("recipe", "data", "train", "eval", "chat", "export", "quickstart"):
        assert verb in text


def test_an_error_is_plain_text_in_a_pipe_with_exit_code_2() -> None:
    done = run("recipe", "show", "llava-1.5/7b-pretrian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no recipe 'llava-1.5/7b-pretrian'")
    assert "did you mean 'llava-1.5/7b-pretrain'?" in done.stderr
    assert "\033[" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "changes"), [(("--debug",), {}), ((), {"VISTUNE_DEBUG": "1"})]
)
def test_debug_shows_the_traceback(arguments: tuple[str, ...], changes: dict[str, str]) -> None:
    done = run(*arguments, "recipe", "show", "nope", **changes)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_wrong_verbs_and_options_exit_2() -> None:
    assert run("tarin").returncode == 2
    assert run("train").returncode == 2
    assert "--resume" in run("train", "llava-1.5/7b-pretrain", "--resume", "--overwrite").stderr


def test_show_is_yaml_with_origins(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: llava-1.5/7b-pretrain\nname: 我的\n", encoding="utf-8")
    done = run("recipe", "show", str(recipe))
    assert done.returncode == 2
    recipe.write_text("base: llava-1.5/7b-pretrain\ndescription: 我的\n", encoding="utf-8")
    done = run("recipe", "show", str(recipe), "train.lr=2e-3")
    assert done.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert f"# {recipe}:2" in lines["description"]
    assert "我的" in lines["description"]
    assert lines["lr"].endswith("# command line (train.lr=2e-3)")


def test_check_names_missing_files(tmp_path: Path) -> None:
    done = run("recipe", "check", "llava-1.5/7b-pretrain", f"data.train.0.images={tmp_path}")
    assert done.returncode == 2
    assert "data.train.0.path: data/LLaVA-Pretrain" in done.stderr
    assert "data.train.0.images" not in done.stderr
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    done = run(
        "recipe", "check", "llava-1.5/7b-pretrain", f"data.train=[{{path: {rows}}}]"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_schema_forms() -> None:
    assert "train.schedule" in run("recipe", "schema", "train").stdout
    assert "## batch" in run("recipe", "schema", "--format", "markdown").stdout
    assert "tune" in json.loads(run("recipe", "schema", "--format", "json").stdout)["properties"]


def test_list_is_one_line_per_recipe_in_a_pipe() -> None:
    done = run("recipe", "list")
    assert "llava-1.5/7b-pretrain\t" in done.stdout


def test_a_closed_pipe_is_not_a_traceback() -> None:
    command = f"{sys.executable} -m vistune recipe schema | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("name")
    assert "Traceback" not in done.stderr


def test_missing_model_and_test_set_are_named(tmp_path: Path) -> None:
    done = run("eval", str(tmp_path), str(tmp_path / "none.jsonl"))
    assert done.returncode == 2
    assert "none.jsonl: cannot read the test set" in done.stderr


def test_recipe_check_looks_for_every_shard_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "s-0.tar").touch()
    (tmp_path / "s-1.tar").touch()
    for last, code in ((1, 0), (2, 2)):
        source = f"{{path: '{tmp_path}/s-{{0..{last}}}.tar', format: webdataset}}"
        done = run("recipe", "check", "llava-1.5/7b-pretrain", f"data.train=[{source}]")
        assert done.returncode == code, done.stderr
    assert "s-2.tar" in done.stderr
