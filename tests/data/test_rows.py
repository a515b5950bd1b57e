"""Rows are found without parsing, exactly where a JSON parser would find them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vistune.data.formats import rows as module
from vistune.data.formats.rows import index_rows
from vistune.errors import DataError, RowError

TRICKY = [
    {"a": 'quote " and \\" and \\\\'},
    {"a": "braces {[,]} in text"},
    [],
    {},
    {"a": [1, [2, {"b": []}]]},
    "a string, with a comma",
    12.5,
    None,
    {"zh": "公园里有三只狗"},
    {"end": "\\"},
]


def read_all(path: Path, **options: Any) -> list[Any]:
    rows = index_rows(path, **options)
    return [rows.parse(k) for k in range(len(rows))]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [7, 64, 1 << 24])
def test_list_rows(
    tmp_path: Path, indent: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert read_all(path) == TRICKY
    for number in (1, 3, len(TRICKY), 99):
        assert read_all(path, max_rows=number) == TRICKY[:number]
    assert index_rows(path).where(4) == "a.json row 4"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.lists(JSON, min_size=1, max_size=5), ascii=st.booleans(), block=st.integers(2, 40)
)
def test_list_rows_equal_a_parser(
    tmp_path: Path, content: list[Any], ascii: bool, block: int
) -> None:
    path = tmp_path / "h.json"
    path.write_bytes(
        json.dumps(content, ensure_ascii=ascii).encode("utf-8", errors="surrogatepass")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block)
        assert read_all(path) == content


@pytest.mark.parametrize("block", [5, 1 << 24])
def test_line_rows(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    content = [{"n": k, "t": "x" * k} for k in range(5)]
    lines = [json.dumps(row).encode() for row in content]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n   \r\n" + b"\r\n".join(lines[1:]))
    rows = index_rows(path)
    assert [rows.parse(k) for k in range(len(rows))] == content
    assert [rows.where(k) for k in (0, 1, 4)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:7"]
    for number in (1, 2, 5, 9):
        assert read_all(path, max_rows=number) == content[:number]
    (tmp_path / "b.jsonl").write_bytes(b"\n\n" + lines[0] + b"\n" + lines[1] + b"\n")
    rows = index_rows(tmp_path / "b.jsonl")
    assert [rows.where(k) for k in range(len(rows))] == ["b.jsonl:3", "b.jsonl:4"]


def test_a_broken_line_is_that_rows_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff\xfe"}\n{"a": "\\ud800"}\n{"a": 2}')
    rows = index_rows(path)
    assert (rows.parse(0), rows.parse(4)) == ({"a": 1}, {"a": 2})
    for row, reason in ((1, "broken_json"), (2, "not_utf8"), (3, "broken_text")):
        with pytest.raises(RowError) as caught:
            rows.parse(row)
        assert (caught.value.reason, caught.value.where) == (reason, f"a.jsonl:{row + 1}")


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (b'[{"a": 1},\n {"b": 2}', ":2:10", "not closed"),
        (b'[{"a": "x}, \n{"b": 2}]', ":2:", "not closed"),
        (b'[{"a": 1}]\n{"b": 2}', ":1:11", "behind the end"),
        (b'[{"a": 1}}', ":1:10", "'}'"),
        (b"[]", "", "empty list"),
        (b"  [ ] ", "", "empty list"),
        (b"", "", "is empty"),
        (b"\xef\xbb\xbf", "", "neither"),
        (b"hello", "", "neither"),
        (b'{\n "a": 1\n}', "", "over several lines"),
    ],
)
def test_a_broken_file_is_an_error_with_its_place(
    tmp_path: Path, content: bytes, place: str, what: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        index_rows(path)
    assert str(path) + place in str(caught.value.where)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(DataError, match="not there"):
            index_rows(path)


def test_rows_survive_pickling(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY))
    rows = pickle.loads(pickle.dumps(index_rows(path)))
    assert [rows.parse(k) for k in range(len(rows))] == TRICKY


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
def test_places_in_a_large_file_are_kept(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_BYTES_WORTH_KEEPING", 1)
    path = tmp_path / name
    lines = [json.dumps({"k": k}).encode() for k in range(9)]

    def write(lines: list[bytes]) -> None:
        path.write_bytes(b"[" + b",".join(lines) + b"]" if name == "f.json" else b"\n".join(lines))

    write(lines)
    first = index_rows(path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_found_rows", None)
        again = index_rows(path)
    for rows in (first, again, pickle.loads(pickle.dumps(again))):
        assert [rows.parse(k) for k in range(len(rows))] == [{"k": k} for k in range(9)]
        assert rows.where(8) == first.where(8)
    assert isinstance(again.starts, np.memmap)
    assert len(index_rows(path, max_rows=3)) == 3
    write([b'{"k": 100}', *lines])
    assert index_rows(path).parse(0) == {"k": 100}
