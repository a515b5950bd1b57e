"""Reads a public model directory: its config, its tensors' names and shapes, its tensors.

Safetensors and PyTorch `.bin` files, in one piece or in shards. Every tensor of every weight file
counts: an index is only used to prove that no shard is missing. Nothing here knows a model.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vistune.errors import ModelError, VistuneError, WeightsError

CONFIG_NAME = "config.json"
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_LISTED = 20

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_config(directory: Path) -> dict[str, Any]:
    """Returns a model directory's `config.json`.

    Raises:
        ModelError: The file is missing, is not a JSON object, or says that the weights are stored
            quantised.
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
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            "the weights are stored quantised, which only their own format's code reads",
            where=f"{path}: quantization_config",
            got=method or quantised,
            expected="weights in bf16, fp16 or fp32",
            fix="take the model's unquantised directory; tune.language.frozen_format=nf4 holds it"
            " in 4 bits while it trains",
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
        named = _named_files(index)
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


def _named_files(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            "the index of the weight files cannot be read",
            where=str(index),
            got=error,
            fix="download the file again",
        ) from error


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a directory by name, one at a time, in its stored number format.

    Raises:
        WeightsError: A file is missing or damaged, or a name stands in two of them.
    """
    for path, names in _by_file(directory):
        with _damage_named(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        yield name, file.get_tensor(name)
            else:
                yield from _unpickled(path, device="cpu").items()


def tensor_names(directory: Path) -> frozenset[str]:
    """Returns the names of a directory's tensors; of safetensors only the headers are read.

    Raises:
        WeightsError: A file is missing or damaged, or a name stands in two of them.
    """
    return frozenset(name for _, names in _by_file(directory) for name in names)


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a directory's tensors by name; no weight is read.

    Raises:
        WeightsError: A file is missing or damaged, or a name stands in two of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, names in _by_file(directory):
        with _damage_named(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    shapes |= {n: tuple(file.get_slice(n).get_shape()) for n in names}
            else:
                found = _unpickled(path, device="meta")
                shapes |= {name: tuple(tensor.shape) for name, tensor in found.items()}
    return shapes


def _by_file(directory: Path) -> list[tuple[Path, list[str]]]:
    """Returns the weight files and the names in each; none stands in two."""
    found: list[tuple[Path, list[str]]] = []
    place: dict[str, Path] = {}
    for path in weight_files(directory):
        with _damage_named(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
            else:
                names = list(_unpickled(path, device="meta"))
        twice = [name for name in names if name in place]
        if twice:
            raise WeightsError(
                f"{len(twice)} tensors stand twice",
                where=str(path),
                got=f"{_listed(twice)}, also in {place[twice[0]].name}",
                fix="keep the weight files of one model alone in the directory",
            )
        place |= dict.fromkeys(names, path)
        found.append((path, names))
    return found


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what the readers raise into an error that names the file."""
    try:
        yield
    except VistuneError:
        raise
    except Exception as error:  # half a pickle fails in many ways, all of them the file's fault
        raise WeightsError(
            "a weight file is damaged, or holds more than tensors",
            where=str(path),
            got=str(error).split("\n")[0][:200] or type(error).__name__,
            fix="download the file again; files that need code to be read are never read",
        ) from error


def _unpickled(path: Path, *, device: Literal["cpu", "meta"]) -> Mapping[str, Tensor]:
    """Reads a PyTorch file of tensors by name; no code in it is run."""
    # PyTorch's format before 1.6 is no archive and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    found = torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsError("this file holds no tensors by name", where=str(path))
    return found


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    public: Mapping[str, str] | None = None,
) -> None:
    """Puts tensors into a model built on the meta device: every one, and no other.

    The tensors become the model's own, so no second copy of the weights is made.

    Args:
        model: The model, on the meta device.
        tensors: By the model's own names, in the number format they shall have.
        where: The directory, for messages.
        public: What the directory calls tensors of the model, where that is something else.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape; all are listed.
    """
    public = public or {}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(expected.keys(), tensors.keys(), where=where)
    wrong = [
        f"{f'{public[name]} as ' if name in public else ''}{name} {tuple(tensors[name].shape)} "
        f"instead of {shape}"
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
