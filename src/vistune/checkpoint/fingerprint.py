"""Tells whether a part's weight files are still the ones a run was started from.

Not a checksum of every byte: that would read a large model from end to end at every start. Sizes
and evenly spread samples of every file are digested, which any retraining or conversion changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from vistune.errors import CheckpointError
from vistune.recipe import ModelConfig

_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_SAMPLE_BYTES = 1 << 14
_SAMPLES = 64


def fingerprint_parts(parts: ModelConfig) -> dict[str, str]:
    """Returns a digest of the weight files of each part that is a local directory, by role."""
    paths = {
        "vision": parts.vision_tower.path if parts.vision_tower else None,
        "language": parts.language_model.path if parts.language_model else None,
        "connector": parts.connector.weights,
        "language adapter": parts.language_model.adapter if parts.language_model else None,
        "vision adapter": parts.vision_tower.adapter if parts.vision_tower else None,
        "aux": parts.vision_tower_aux.path if parts.vision_tower_aux else None,
        "model": parts.from_checkpoint,
        "vision base": parts.bases.vision_tower,
        "language base": parts.bases.language_model,
    }
    return {
        role: fingerprint(Path(path))
        for role, path in paths.items()
        if path is not None and Path(path).exists()
    }


def fingerprint(place: Path) -> str:
    """Returns a digest of a weight file, or of those in a directory and right below it."""
    digest = hashlib.sha256()
    # SwissArmyTransformer keeps its weights one folder down.
    found = [place] if place.is_file() else [*place.iterdir(), *place.glob("*/mp_rank_*.pt")]
    for path in sorted(p for p in found if p.suffix in _SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            step = max(_SAMPLE_BYTES, size // _SAMPLES)
            for start in (*range(0, size, step), max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def require_same_parts(recorded: Mapping[str, str], parts: ModelConfig, *, where: Path) -> None:
    """Refuses parts whose weight files have changed.

    Args:
        recorded: Digests when the run started.
        parts: The parts now.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: A digest differs.
    """
    now = fingerprint_parts(parts)
    changed = sorted(role for role, digest in now.items() if recorded.get(role, digest) != digest)
    if changed:
        raise CheckpointError(
            f"the weight files of {' and '.join(changed)} were changed since the run started",
            where=str(where),
            expected="the files the trained weights were trained on",
            fix="bring the original files back",
        )
