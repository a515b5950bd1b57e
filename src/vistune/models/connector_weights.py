"""Reads a connector that was trained elsewhere, from whatever names its weights were saved under.

Known are LLaVA's `mm_projector.bin`, XTuner's `projector/` and its checkpoints (`iter_*.pth`) that
hold nothing but the projector, and `connector.safetensors` of vistune's adapter export. Which one
a file is stands in its keys.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vistune.errors import WeightsError
from vistune.models.weights import check_keys

KEY = "model.connector.weights"
# The longest that fits is taken: `model.mm_projector.` before `model.`.
_PREFIXES = (
    "base_model.model.model.mm_projector.",
    "model.mm_projector.",
    "projector.model.",
    "mm_projector.",
    "connector.",
    "model.",
)
_FOLDER_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "connector.safetensors",
    "weights.safetensors",  # a checkpoint of a run that trained the connector alone
    "mp_rank_00_model_states.pt",  # DeepSpeed's, in a directory that is called like a file
)


def load_connector(connector: nn.Module, path: Path) -> None:
    """Puts saved weights into a connector.

    Args:
        connector: Changed in place.
        path: A file, or a directory that holds one (`projector/`).

    Raises:
        WeightsError: The file is missing or damaged, holds something else besides a connector, or
            does not fit this one.
    """
    prefix, state = _read_named(path)
    if isinstance(connector, nn.Linear) and any(name.startswith("0.") for name in state):
        # XTuner's projector of depth 1 is a sequence of one layer.
        state = {name.removeprefix("0."): tensor for name, tensor in state.items()}
        prefix += "0."
    own = connector.state_dict()
    check_keys(
        missing=[prefix + name for name in own.keys() - state.keys()],
        unexpected=[prefix + name for name in state.keys() - own.keys()],
        mismatched=[
            (prefix + name, tensor.shape, own[name].shape)
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ],
        where=str(path),
    )
    connector.load_state_dict({name: state[name].to(own[name].dtype) for name in own})


def read_connector(path: Path) -> dict[str, Tensor]:
    """Returns a connector's weights by their names inside it.

    Args:
        path: A file, or a directory that holds one.

    Raises:
        WeightsError: See `load_connector`.
    """
    return _read_named(path)[1]


def _read_named(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Returns what a file puts in front of a connector's names, and `read_connector`."""
    file = _file_of(path)
    tensors = read_tensors_of(file)
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return prefix, {n.removeprefix(prefix): tensor for n, tensor in tensors.items()}
    others = sorted(n for n in tensors if not n.startswith(_PREFIXES[:-1]))
    raise WeightsError(
        "this file does not hold a connector alone",
        where=str(file),
        got=f"{len(others)} other weights such as {', '.join(others[:3])}" if others else "nothing",
        expected="weights under one of " + ", ".join(_PREFIXES),
        fix="name a whole model by its directory; convert a checkpoint of XTuner that holds more"
        " than the projector (pth_to_hf) and name that directory in model.from_checkpoint",
    )


def _file_of(path: Path) -> Path:
    file = path.expanduser()
    if file.is_dir():
        found = [file / name for name in _FOLDER_FILES if (file / name).is_file()]
        file = found[0] if found else file
    if not file.is_file():
        raise WeightsError(
            "there are no connector weights here",
            where=str(path),
            expected=f"a file, or a directory with {' or '.join(_FOLDER_FILES)}",
            fix=f"set {KEY}",
        )
    return file


def read_beside(path: Path) -> Mapping[str, object]:
    """Returns what a checkpoint of training holds beside its weights; objects are never made.

    Args:
        path: A PyTorch file, or a directory that holds one.

    Raises:
        WeightsError: It cannot be read.
    """
    file = _file_of(path)
    found = {} if file.suffix == ".safetensors" else _read(file)
    return found if isinstance(found, Mapping) else {}


class _Inert:
    """Stands for an object of a class that is not known, which is neither made nor run."""

    def __init__(self, *arguments: object) -> None:
        del arguments

    def __setstate__(self, state: object) -> None:
        del state


def _load_inert(file: Path) -> object:
    """Reads a PyTorch file without running any code that it names.

    Checkpoints of training frameworks hold objects of theirs beside the weights (XTuner's: curves
    of the loss). Every name that is not torch's own is read as something that does nothing.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (ValueError, RuntimeError):  # not a file in PyTorch's present format
        unknown = []
    stands_for: list[Any] = [(_Inert, name) for name in unknown]
    # Mapped, so that asking for shapes reads none of a large file; older formats cannot be.
    mapped = zipfile.is_zipfile(file)
    with torch.serialization.safe_globals(stands_for):
        return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return _load_inert(file)
    except Exception as error:  # half a pickle fails in many ways, all of them the file's fault
        raise WeightsError(
            "these weights cannot be read as plain tensors",
            where=str(file),
            got=str(error).split("\n")[0][:200] or type(error).__name__,
            fix="copy the file again, or convert it where it was made (XTuner: convert pth_to_hf)",
        ) from error


def read_tensors_of(file: Path) -> dict[str, Tensor]:
    """Reads the weights of a file by name, whatever they are of; nothing in it is run.

    Args:
        file: Safetensors, or a PyTorch file of weights, alone or among what training keeps.

    Raises:
        WeightsError: It is missing, damaged, or holds no weights by name.
    """
    found = _read(_file_of(file))
    for wrapper in ("state_dict", "module"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsError("this file holds no weights by name", where=str(file))
    return dict(found)
