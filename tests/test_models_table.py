"""docs/models.md says what its list of tests says, and every test in the list is there."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models" / "native"))

from native_dirs import KINDS

from models_table import COLUMNS, NATIVE, PAGE, ROOT, ROWS, Missing, _passed, all_tests, render


def test_the_page_is_the_rendered_list() -> None:
    # Written anew with: python tests/models_table.py
    assert PAGE.read_text(encoding="utf-8") == render()


def test_every_model_has_every_column() -> None:
    assert all(len(row) == len(COLUMNS) for row in ROWS.values())
    cells = [cell for row in ROWS.values() for cell in row]
    assert all(cell.reason if isinstance(cell, Missing) else cell.tests for cell in cells)


def test_every_kind_of_transformers_own_has_a_row() -> None:
    assert set(NATIVE.values()) == set(KINDS)


def test_the_tests_it_names_are_there() -> None:
    for test in all_tests():
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names, test


def test_a_test_that_fails_takes_its_tick() -> None:
    name = all_tests()[-1]
    page = render(frozenset({name}))
    assert "its test does not pass" in page and page.count("✓") < render().count("✓")
    ran = {"a.py::t[x]": True, "a.py::t[y]": False, "a.py::tt": True}
    assert not _passed("a.py::t", ran)
    assert _passed("a.py::t[x]", ran)
    assert not _passed("a.py", ran)
    assert not _passed("b.py::t", ran)
