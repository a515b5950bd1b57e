"""The files that a path with wildcards names, as WebDataset's users write shards.

shards/train-*.tar        shards/train-{000..127}.tar        {a,b}/*.tar
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[{]")


def is_pattern(path: str) -> bool:
    """Returns whether a path stands for others: it has wildcards, and no file is called so."""
    return _WILD.search(path) is not None and not Path(path).exists()


def files_of(path: str) -> list[Path]:
    """Returns the files that a pattern names, in order; of a plain path, that path.

    Ranges in braces name every number, whether the file is there or not, so that a shard that is
    missing is noticed.
    """
    if not is_pattern(path):
        return [Path(path)]
    found: list[Path] = []
    for name in _expanded(path):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
        found += [Path(match) for match in matches]
    return list(dict.fromkeys(found))


def _expanded(path: str) -> list[str]:
    braces = _BRACES.search(path)
    if braces is None:
        return [path]
    content = braces.group(1)
    numbers = _RANGE.fullmatch(content)
    if numbers is None:
        parts = content.split(",")
    else:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts = [f"{k:0{width}d}" for k in range(int(first), int(last) + 1)]
    head, tail = path[: braces.start()], path[braces.end() :]
    return [name for part in parts for name in _expanded(head + part + tail)]
