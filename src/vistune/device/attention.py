"""Which way of computing attention a device is given, and why; the ways are `models.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch

from vistune.device import nvidia_capability
from vistune.errors import DeviceError

AttentionName: TypeAlias = Literal["varlen", "cudnn", "flex", "sdpa", "npu", "flash_attn"]
WantedAttention: TypeAlias = Literal["auto", "varlen", "cudnn", "flex", "sdpa", "npu", "flash_attn"]
HOPPER = (9, 0)
_HALF = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256
USUAL_HEAD = 64
_PACKAGES: dict[str, tuple[str, str]] = {
    "npu": ("torch_npu", "npu"),
    "cudnn": ("nvidia-cudnn-frontend", "cudnn"),
    "flash_attn": ("flash-attn", "flash"),
}
"""The package that a way of computing attention needs, and the extra that brings it."""


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of attention.

    Args:
        head_dim: Width of a head.
        dtype: Format of queries, keys and values.
        softcap: Whether scores are capped.
        dropout: Whether weights are dropped while training.
    """

    head_dim: int
    dtype: torch.dtype
    softcap: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class AttentionSupport:
    """What a device and its packages offer.

    Args:
        kind: Kind of the device.
        hopper: Whether it is an NVIDIA GPU of compute capability 9.0.
        flash: Version of the flash-attn package (3 or 2), or None.
        npu: Whether torch_npu is installed.
        cudnn: Whether the package nvidia-cudnn-frontend is installed.
    """

    kind: str
    hopper: bool = False
    flash: int | None = None
    npu: bool = False
    cudnn: bool = False

    @classmethod
    def of(cls, device: torch.device) -> AttentionSupport:
        """Looks at a device and at what is installed; imports nothing."""
        return cls(
            device.type,
            nvidia_capability(device) == HOPPER,
            flash_version(),
            npu=find_spec("torch_npu") is not None,
            cudnn=find_spec("cudnn") is not None,
        )


@dataclass(frozen=True)
class AttentionChoice:
    """How attention is computed.

    Args:
        name: Its name, as in recipes; `own` for a model that brings its own.
        reason: Why this one.
    """

    name: AttentionName | Literal["own"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def flash_version() -> int | None:
    """Returns 3 or 2 for the newest FlashAttention package installed, None without one."""
    if find_spec("flash_attn_interface") is not None:
        return 3
    return 2 if find_spec("flash_attn") is not None else None


def why_not(name: AttentionName, support: AttentionSupport, needs: AttentionNeeds) -> str | None:
    """Returns why a way of computing attention cannot serve a model, or None when it can.

    Args:
        name: The way.
        support: What the device offers.
        needs: What the model asks.
    """
    if name == "sdpa":
        return None
    if support.kind != _home(name):
        return f"it trains on {_home(name)} only, the device is {support.kind}"
    if _lacks_package(name, support):
        return f"{_PACKAGES[name][0]} is not installed"
    if name == "cudnn" and not support.hopper:
        return "its kernels are used on compute capability 9.0"
    if name == "flex":
        if needs.dropout:
            return "the model drops attention weights"
        width = needs.head_dim
        odd = width & (width - 1) != 0 or width > _WIDEST_HEAD or width < 16
        return f"heads are {width} wide" if odd else None
    multiple = 16 if name == "npu" else 8
    if needs.head_dim % multiple or needs.head_dim > _WIDEST_HEAD:
        return f"heads are {needs.head_dim} wide"
    if name != "npu" and needs.dtype not in _HALF:
        return f"it takes 16-bit numbers, these are {_word(needs.dtype)}"
    if needs.softcap and name != "flash_attn":
        return "the model caps attention scores"
    takes_dropout = name == "npu" or (name == "flash_attn" and support.flash == 2)
    if needs.dropout and not takes_dropout:
        return "the model drops attention weights"
    return None


def _home(name: AttentionName) -> str:
    return "npu" if name == "npu" else "cuda"


def _lacks_package(name: AttentionName, support: AttentionSupport) -> bool:
    there = {"npu": support.npu, "cudnn": support.cudnn, "flash_attn": support.flash is not None}
    return not there.get(name, True)


def require_attention(wanted: WantedAttention, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what no model could have on this device, before any model is looked at.

    Args:
        wanted: `train.attention` of the recipe.
        device: Where it would run.
        dtype: Format of the arithmetic.

    Raises:
        DeviceError: Device, package or number format stand in the way.
    """
    choose_attention(wanted, AttentionSupport.of(device), AttentionNeeds(USUAL_HEAD, dtype))


def choose_attention(
    wanted: WantedAttention, support: AttentionSupport, needs: AttentionNeeds
) -> AttentionChoice:
    """Chooses how a model's attention over packed rows is computed.

    Args:
        wanted: `train.attention` of the recipe.
        support: What the device offers.
        needs: What the model asks.

    Raises:
        DeviceError: The one asked for cannot serve this model on this device.
    """
    if wanted != "auto":
        obstacle = why_not(wanted, support, needs)
        if obstacle is not None:
            at_home = support.kind == _home(wanted)
            lacks = at_home and _lacks_package(wanted, support)
            install = f"pip install 'vistune[{_PACKAGES[wanted][1]}]', or " if lacks else ""
            raise DeviceError(
                f"attention '{wanted}' cannot be used: {obstacle}",
                where="train.attention",
                fix=f"{install}set train.attention=auto",
            )
        return AttentionChoice(wanted, "as the recipe says")
    passed_over: list[str] = []
    for name, reason in _preferences(support, needs):
        obstacle = why_not(name, support, needs)
        if obstacle is None:
            why = f"; not {passed_over[0]}" if passed_over else ""
            return AttentionChoice(name, reason + why)
        passed_over.append(f"{name}: {obstacle}")
    raise AssertionError("sdpa serves every model")


def choose_row_attention(
    wanted: WantedAttention, support: AttentionSupport, needs: AttentionNeeds
) -> AttentionChoice:
    """As `choose_attention`, for a vision tower, whose images are rows of one length.

    Args:
        wanted: `train.attention` of the recipe.
        support: What the device offers.
        needs: What the tower asks.
    """
    if wanted == "auto" or wanted == "sdpa" or wanted == "flex" or wanted == "cudnn":
        reason = "images of one size are a plain batch"
        if wanted == "flex" or wanted == "cudnn":
            reason += f", which {wanted} has nothing to add to"
        return AttentionChoice("sdpa", reason)
    obstacle = why_not(wanted, support, needs)
    if obstacle is not None:
        return AttentionChoice("sdpa", f"not {wanted}: {obstacle}")
    return AttentionChoice(wanted, "as the recipe says")


def _preferences(
    support: AttentionSupport, needs: AttentionNeeds
) -> list[tuple[AttentionName, str]]:
    """Best first; the last one serves every model."""
    anywhere: tuple[AttentionName, str] = ("sdpa", "one call for each sample, on any device")
    if support.kind == "npu":
        return [("npu", "the device's own fused attention"), anywhere]
    if support.kind != "cuda":
        return [anywhere]
    varlen: tuple[AttentionName, str] = ("varlen", "torch's own kernel for packed rows")
    flash: tuple[AttentionName, str] = ("flash_attn", "flash-attn is installed")
    if needs.dtype not in _HALF:
        return [varlen, anywhere]
    compiled: tuple[AttentionName, str] = ("flex", "compiled for this model's scores")
    if support.flash == 3 and support.hopper:
        return [("flash_attn", "FlashAttention 3 is installed"), varlen, compiled, anywhere]
    if support.cudnn and support.hopper:
        ragged: tuple[AttentionName, str] = ("cudnn", "cuDNN's kernels for ragged rows")
        return [ragged, varlen, flash, compiled, anywhere]
    return [varlen, flash, compiled, anywhere]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[-1]
