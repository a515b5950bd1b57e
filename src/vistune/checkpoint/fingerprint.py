"""Tells whether a part's weights are still the ones a run was started from.

Where a checkpoint does not keep the small files of its parts (`described`), the tokenizer's too.
Not a checksum of every byte: that would read a large model from end to end at every start. Sizes
and evenly spread samples of every file are digested, which any retraining or conversion changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vistune.checkpoint.described import PARTS_NAME, places
from vistune.errors import CheckpointError
from vistune.recipe import ModelConfig

_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "ice_text.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_SAMPLE_BYTES = 1 << 14
_SAMPLES = 64


def fingerprint_parts(parts: ModelConfig) -> dict[str, str]:
    """Returns a digest of the weight files of each part that is a local directory, by role.

    The files of the tokenizer, which ids a run's weights were trained on, are a role of their own.
    """
    there = places(parts)
    found = {role: fingerprint(path) for role, path in there.items() if path.exists()}
    # As the tokenizer is looked for: beside the language model, else with the whole model.
    speaks = [there[role] for role in ("language", "model", "language base") if role in there]
    files = _tokenizer_files(speaks[0]) if speaks else []
    if files:
        found["tokenizer"] = _digest(files)
    return found


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


def fingerprint(place: Path) -> str:
    """Returns a digest of a weight file, or of those in a directory and right below it."""
    # SwissArmyTransformer keeps its weights one folder down.
    found = [place] if place.is_file() else [*place.iterdir(), *place.glob("*/mp_rank_*.pt")]
    return _digest(sorted(p for p in found if p.suffix in _SUFFIXES))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            step = max(_SAMPLE_BYTES, size // _SAMPLES)
            for start in (*range(0, size, step), max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def require_same_parts(recorded: Mapping[str, str], parts: ModelConfig, *, where: Path) -> None:
    """Refuses parts whose weight files have changed, or whose tokenizer, unless that is kept.

    Args:
        recorded: Digests when the run started.
        parts: The parts now.
        where: The checkpoint; one that keeps its tokenizer does not ask the parts for it.

    Raises:
        CheckpointError: A digest differs.
    """
    now = fingerprint_parts(parts)
    if (where / PARTS_NAME).is_dir():
        now.pop("tokenizer", None)
    changed = sorted(role for role, digest in now.items() if recorded.get(role, digest) != digest)
    if changed:
        raise CheckpointError(
            f"the files of {' and '.join(changed)} were changed since the run started",
            where=str(where),
            expected="the files the trained weights were trained on",
            fix="bring the original files back, or name the directory that holds them",
        )
