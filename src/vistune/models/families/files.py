"""Reads a public model directory: its config, its tensors' names and shapes, its tensors.

Safetensors and PyTorch `.bin` files, in one piece or in shards. Every tensor of every weight file
counts: an index is only used to prove that no shard is missing. Nothing here knows a model.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vistune.errors import ModelError, WeightsError

CONFIG_NAME = "config.json"
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_LISTED = 20

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_config(directory: Path) -> dict[str, Any]:
    """Returns a model directory's `config.json`.

    Raises:
        ModelError: The file is missing or is not a JSON object.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"the model directory has no {CONFIG_NAME}",
            where=str(directory),
            fix="name a directory that holds config.json and the weights",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError("the model's config cannot be read", where=str(path), got=error) from error
    if not isinstance(config, dict):
        raise ModelError(
            "the model's config is not a JSON object", where=str(path), got=type(config).__name__
        )
    return config


def weight_files(directory: Path) -> list[Path]:
    """Returns the files that hold a directory's weights; safetensors are preferred.

    Raises:
        WeightsError: There is none, or the index names one that is missing.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    suffix = files[0].suffix if files else None
    for name in _INDEX_NAMES:
        index = directory / name
        if not index.is_file() or (suffix is not None and suffix not in name):
            continue
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise WeightsError(
                f"{len(missing)} of {len(named)} weight files are missing",
                where=str(directory),
                got=_listed(missing),
                fix="download the missing files again",
            )
    if not files:
        raise WeightsError(
            "the model directory has no weight file",
            where=str(directory),
            expected="*.safetensors or pytorch_model*.bin",
        )
    return files


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a directory by name, one at a time, in its stored number format.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    for path in weight_files(directory):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        yield name, file.get_tensor(name)
            else:
                yield from torch.load(
                    path, map_location="cpu", mmap=True, weights_only=True
                ).items()
        except (SafetensorError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise WeightsError("a weight file is damaged", where=str(path), got=error) from error


def tensor_names(directory: Path) -> frozenset[str]:
    """Returns the names of a directory's tensors; of safetensors only the headers are read."""
    names: set[str] = set()
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    names.update(file.keys())
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    "a weight file is damaged", where=str(path), got=error
                ) from error
        else:
            names.update(torch.load(path, map_location="meta", mmap=True, weights_only=True))
    return frozenset(names)


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a directory's tensors by name; no weight is read.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        shapes[name] = tuple(file.get_slice(name).get_shape())
            else:
                found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
                shapes |= {name: tuple(tensor.shape) for name, tensor in found.items()}
        except (SafetensorError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise WeightsError("a weight file is damaged", where=str(path), got=error) from error
    return shapes


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Puts tensors into a model built on the meta device: every one, and no other.

    The tensors become the model's own, so no second copy of the weights is made.

    Args:
        model: The model, on the meta device.
        tensors: By the model's own names, in the number format they shall have.
        where: The directory, for messages.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape; all are listed.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(expected.keys(), tensors.keys(), where=where)
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise WeightsError(
            f"{len(wrong)} tensors have another shape than the config says",
            where=where,
            got=_listed(wrong, separator="; "),
            fix="use the config.json that belongs to these weights",
        )
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def check_names(expected: Set[str], found: Set[str], *, where: str) -> None:
    """Proves that two sets of tensor names are one.

    Raises:
        WeightsError: They are not; what is missing and what is left over is listed.
    """
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise WeightsError(
            f"the weights do not fit the model: {len(missing)} tensors are missing and "
            f"{len(extra)} are left over",
            where=where,
            got=f"left over: {_listed(extra)}" if extra else None,
            expected=f"missing: {_listed(missing)}" if missing else None,
        )


def built_on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    """Returns a model built without memory for its weights, to be filled with `fill`."""
    with torch.device("meta"):
        return build()


def _listed(names: list[str], *, separator: str = ", ") -> str:
    more = len(names) - _MAX_LISTED
    return separator.join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
