"""What is installed, what this machine offers, and what would go wrong. It changes nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from vistune.device import select_device
from vistune.errors import DeviceError

_MIN_FREE_GIB = 5.0
_OPTIONAL = (
    ("gguf", "gguf", "language models in GGUF files"),
    ("timm", "timm", "vision towers from timm"),
    ("onnx", "quickstart", "the quick start's language model"),
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Args:
        state: ok, note (works, worth knowing) or problem (something will fail).
        what: What was looked at.
        found: What was found.
        fix: What mends it; empty where nothing is to be done.
    """

    state: Literal["ok", "note", "problem"]
    what: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Looks at versions, device, memory, disk and optional packages."""
    return [*_packages(), *_device(), *_machine(), *_optional()]


def _packages() -> Iterator[Finding]:
    """Compares what is installed with what this version of vistune was made for."""
    yield Finding("ok", "python", f"{sys.version.split()[0]}, {sys.executable}")
    for line in metadata.requires("vistune") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", needed.name, "not installed", f"pip install '{needed}'")
            continue
        if needed.specifier.contains(version, prereleases=True):
            yield Finding("ok", needed.name, version)
        else:
            yield Finding(
                "problem",
                needed.name,
                f"{version}, outside {needed.specifier}",
                f"pip install '{needed}'",
            )
    yield from _torchvision()


def _torchvision() -> Iterator[Finding]:
    """A torchvision built for another torch breaks the import of transformers' models."""
    if importlib.util.find_spec("torchvision") is None:
        return
    version = metadata.version("torchvision")
    try:
        import torchvision  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        yield Finding(
            "problem",
            "torchvision",
            f"{version} does not fit the torch that is installed: {str(error).splitlines()[0]}",
            "pip uninstall torchvision (vistune does not need it), or install the matching build",
        )
    else:
        yield Finding("ok", "torchvision", f"{version} (not needed)")


def _device() -> Iterator[Finding]:
    try:
        device = select_device()
    except DeviceError as error:
        yield Finding("problem", "device", error.what, error.fix or "")
        return
    dtype = str(device.dtype).removeprefix("torch.")
    found = f"{device.kind}: {device.name}, computes in {dtype}"
    yield Finding("note" if device.note else "ok", "device", found, device.note)
    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device.torch_device)
        share = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        is_taken = free < total / 2
        fix = "another process holds much of it" if is_taken else ""
        yield Finding("note" if is_taken else "ok", "device memory", share, fix)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS")
    found = f"{threads} of {cores} cores" + (f" (OMP_NUM_THREADS={told})" if told else "")
    is_few = cores is not None and threads * 2 <= cores and told is not None
    fix = "unset OMP_NUM_THREADS to use them all" if is_few else ""
    yield Finding("note" if is_few else "ok", "threads", found, fix)
    for name, folder in (("disk here", Path.cwd()), ("disk of the home folder", Path.home())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free_gib = shutil.disk_usage(existing).free / 2**30
        is_low = free_gib < _MIN_FREE_GIB
        fix = "checkpoints may not fit" if is_low else ""
        yield Finding("note" if is_low else "ok", name, f"{free_gib:.0f} GiB free, {folder}", fix)


def _optional() -> Iterator[Finding]:
    for module, extra, purpose in _OPTIONAL:
        if importlib.util.find_spec(module) is None:
            fix = f"pip install 'vistune[{extra}]'"
            yield Finding("note", module, f"not installed; only for {purpose}", fix)
        else:
            yield Finding("ok", module, f"{metadata.version(module)}, for {purpose}")
    for program, purpose in (("npm", "fetching the quick start's language model"),):
        where = shutil.which(program)
        if where is None:
            yield Finding("note", program, f"not installed; only for {purpose}", "install Node.js")
        else:
            yield Finding("ok", program, f"{where}, for {purpose}")
