"""Strict loading of transformers models: what is missing, left over or of another shape stops.

Transformers fills missing weights with random numbers and says so in a log line; here it is an
error that names the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistune.errors import MissingExtraError, ModelError, WeightsError
from vistune.models.hub import is_hub_id

_SHOWN_KEYS = 8


@dataclass(frozen=True)
class LoadReport:
    """What came out of a directory of weights.

    Args:
        path: Directory or hub id.
        num_ignored: Weights there that the part does not use, by rule.
    """

    path: str
    num_ignored: int


def part_path(path: str, *, key: str) -> str:
    """Returns a local directory with `~` expanded, or a hub id as it is.

    Args:
        path: As the recipe wrote it.
        key: Its key in the recipe, for messages.

    Raises:
        ModelError: It is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ModelError(
            "this is a file, not a directory", where=path, fix=f"set {key} to its directory"
        )
    if not is_hub_id(path):
        raise ModelError(
            "there is no such directory",
            where=path,
            expected="a directory with config.json and weights, or a hub id (owner/name)",
            fix=f"set {key}",
        )
    return path


def hub_error(error: Exception, *, path: str, key: str) -> ModelError:
    """Returns the message for a part that transformers could not read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or [type(error).__name__])[0]
    if first.endswith(":"):  # a heading says nothing without what stands below
        first = " ".join(lines[:2])
    local = Path(path).is_dir()
    return ModelError(
        "its files cannot be read" if local else "it is no local directory and not on the hub",
        where=path,
        got=first[:300],
        expected=None if local else "a local directory, or a hub id this machine can reach",
        fix=f"check the files in {path}" if local else f"set {key} to a downloaded directory",
    )


def load_strictly(
    model_class: Any,
    path: str,
    *,
    key: str,
    dtype: torch.dtype,
    revision: str | None = None,
    harmless: Callable[[str], bool] = lambda key: False,
    optional: Callable[[str], bool] = lambda key: False,
    **arguments: Any,
) -> tuple[Any, LoadReport]:
    """Loads a model and accounts for every weight.

    Args:
        model_class: A class of transformers with `from_pretrained`.
        path: Directory or hub id.
        key: The path's key in the recipe, for messages.
        dtype: Format of the weights.
        revision: Of a hub id.
        harmless: Whether a weight that the model has no place for may be left.
        optional: Whether a weight of the model may be missing.
        arguments: For `from_pretrained`.

    Returns:
        The model in evaluation mode, and what was loaded.

    Raises:
        WeightsError: A weight is missing, left over or of another shape.
        ModelError: The files cannot be read.
        MissingExtraError: A package for this kind of file is not installed.
    """
    path = part_path(path, key=key)
    # Shapes are checked below, where the message can name them.
    arguments |= {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": dtype}
    if revision is not None:
        arguments["revision"] = revision
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(path, **arguments)
    except ImportError as error:
        if "gguf" in str(error).lower():
            raise MissingExtraError.of("gguf", extra="gguf", purpose="a GGUF file") from error
        raise hub_error(error, path=path, key=key) from error
    except Exception as error:
        raise hub_error(error, path=path, key=key) from error
    check_keys(
        missing=[name for name in info["missing_keys"] if not optional(name)],
        unexpected=[name for name in info["unexpected_keys"] if not harmless(name)],
        mismatched=[tuple(entry) for entry in info["mismatched_keys"]],
        where=path,
    )
    return model.eval(), LoadReport(path, len(info["unexpected_keys"]))


def check_keys(
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[Any, ...]] = (),
    where: str,
) -> None:
    """Stops when the keys of weights do not fit a model.

    Args:
        missing: Weights the model needs and the file lacks.
        unexpected: Weights in the file without a place in the model.
        mismatched: (name, shape in the file, shape of the model).
        where: Path, for the message.

    Raises:
        WeightsError: Any of them is not empty.
    """
    lists = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(
            f"{name} (file {tuple(found)}, model {tuple(expected)})"
            for name, found, expected in mismatched
        ),
    }
    lists = {name: keys for name, keys in lists.items() if keys}
    if not lists:
        return
    shown = "; ".join(
        f"{name}: {', '.join(keys[:_SHOWN_KEYS])}"
        + (f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else "")
        for name, keys in lists.items()
    )
    counts = ", ".join(f"{len(keys)} {name}" for name, keys in lists.items())
    raise WeightsError(
        f"the weights do not fit the model its config describes: {counts}",
        where=where,
        got=shown,
        fix="download the directory again, or use weights and config.json of one model",
    )


class quiet_transformers:  # noqa: N801 - used like contextlib's lower-case managers
    """Silences transformers' load reports and progress bars: what they say is an error here."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
