"""Names of the hub: a directory of this machine for each, fetched into the hub's cache if need be.

What is in the cache is taken without a network. Everything that reads models is given directories;
nothing else here asks the hub.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from vistune.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
_NOT_SMALL = ("*.index.json", "trainer_state.json")  # of the weights, and of nobody's concern
_NEW_WEIGHTS, _OLD_WEIGHTS = "*.safetensors", ("*.bin", "*.pt", "*.pth")
_FOLDERS = ("checkpoints", "evaluations", "models", "parts", "quickstart", "runs")
"""Where vistune and its recipes keep things: never an owner on the hub."""
_BELOW = "*/*"  # other formats of the same weights


def is_small(name: str) -> bool:
    """Whether a file of a model, by its name, says what the model is; others are weights."""
    chosen = any(fnmatch(name, pattern) for pattern in _SMALL)
    return chosen and not any(fnmatch(name, pattern) for pattern in _NOT_SMALL)


def is_hub_id(name: str) -> bool:
    """Whether a path a person gave can only be a name of the hub.

    `parts/llama` beside a folder `parts` is a misspelt directory, and `runs/mine` a run that is not
    here: a stranger's model of that name must not take its place.

    Args:
        name: As it was written.
    """
    folder = Path(name).expanduser()
    if folder.exists() or _HUB_ID.fullmatch(name) is None:
        return False
    owner = folder.parent
    return owner == Path() or not (owner.is_dir() or str(owner) in _FOLDERS)


def in_cache(name: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this machine holds a model's config.

    Args:
        name: A hub id.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def fetch(
    name: str,
    *,
    key: str,
    revision: str | None = None,
    weights: bool = True,
    gguf_file: str | None = None,
) -> Path:
    """Returns the directory of a model of the hub, fetching what is not in the cache.

    Args:
        name: A hub id.
        key: Its key in the recipe, for messages.
        revision: Branch, tag or commit.
        weights: Whether the weights are needed; without, configs and tokenizer alone.
        gguf_file: The weights' file where they are GGUF.

    Raises:
        ModelError: It is neither in the cache nor can it be fetched.
    """
    folder = _snapshot(name, [*_SMALL], key=key, revision=revision)
    if not weights:
        return folder
    if gguf_file is not None:
        _snapshot(name, [gguf_file], key=key, revision=revision)
        return folder
    _snapshot(name, [_NEW_WEIGHTS], key=key, revision=revision)
    if not any(folder.glob(_NEW_WEIGHTS)):
        _snapshot(name, [*_OLD_WEIGHTS], key=key, revision=revision)
        if not any(path for pattern in _OLD_WEIGHTS for path in folder.glob(pattern)):
            raise ModelError(
                "this machine holds the small files of this model, and no weights",
                where=name,
                got=str(folder),
                expected="*.safetensors or *.bin",
                fix=f"hf download {name}",
            )
    return folder


def _snapshot(name: str, patterns: list[str], *, key: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    at = "" if revision is None else f" at revision {revision}"
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=[_BELOW]
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(
            f"it is no local directory, not in the hub's cache{at}, and could not be fetched",
            where=name,
            got=f"{type(error).__name__}: {first[:300]}",
            expected="a local directory, or a hub id that this machine can reach or holds",
            fix=f"set {key} to a downloaded directory; where there is a network:"
            f" hf download {name}{'' if revision is None else f' --revision {revision}'}"
            " (hf auth login first for a model behind a licence)",
        ) from error
    return Path(folder)


def commit_of(folder: Path) -> str | None:
    """Returns the commit that a directory of the hub's cache holds, None for any other place."""
    in_cache = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if in_cache else None
