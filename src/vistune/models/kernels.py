"""Norms and gates of a decoder by liger-kernel, where its layers do not run fused.

It replaces modules of this one model by modules that hold the same parameters under the same names;
no class of another library is changed. A replacement is tried out beside the original before it
stands in for it. Rotary embeddings are turned inside attention layers, by a function and not by a
module, and stay as they are; the loss takes its logits in chunks already (`train.loss`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from vistune.device import has_triton
from vistune.errors import DeviceError, MissingExtraError, ModelError
from vistune.models.contract import ModuleMap

Casting: TypeAlias = Literal["llama", "gemma"]
_NORMS: dict[str, tuple[float, Casting]] = {
    "GemmaRMSNorm": (1.0, "gemma"),
    "Gemma2RMSNorm": (1.0, "gemma"),
    "Gemma3RMSNorm": (1.0, "gemma"),
    "Olmo2RMSNorm": (0.0, "gemma"),
}
"""Norms that store their weight minus one, or multiply by it before they round; others as Llama."""
_GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu", "NewGELUActivation": "gelu"}
_GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest error allowed against the original, of the largest value: sums in another order in fp32,
and one rounding more or less in 16 bit."""


class Ops(Protocol):
    """The kernels; liger's on a GPU."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting
    ) -> Tensor:
        """Root-mean-square norm over the last dimension."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) * up."""
        ...

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """GELU(gate), by the tangent, * up."""
        ...


class LigerOps:
    """The functions of liger-kernel."""

    def __init__(self) -> None:
        self._ops: Any = import_module("liger_kernel.ops")

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting
    ) -> Tensor:
        """See `Ops`."""
        # Not in place: the gradient that comes in may be read by a residual path too.
        out = self._ops.LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)
        assert isinstance(out, Tensor)
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Ops`."""
        out = self._ops.LigerSiLUMulFunction.apply(gate, up)
        assert isinstance(out, Tensor)
        return out

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Ops`."""
        out = self._ops.LigerGELUMulFunction.apply(gate, up)
        assert isinstance(out, Tensor)
        return out


class KernelNorm(nn.Module):
    """An RMSNorm that computes by a kernel, over the original's weight.

    Args:
        original: The norm.
        ops: The kernels.
    """

    def __init__(self, original: Any, ops: Ops) -> None:
        super().__init__()
        self.weight = original.weight
        self._eps = float(_eps_of(original))
        self._offset, self._casting = _NORMS.get(type(original).__name__, (0.0, "llama"))
        self._ops = ops
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return self._ops.rms_norm(x, self.weight, self._eps, self._offset, self._casting)


class KernelGate(nn.Module):
    """A gated MLP whose activation and product are one kernel, over the original's projections.

    Args:
        original: The MLP.
        ops: The kernels.
    """

    def __init__(self, original: Any, ops: Ops) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = original.gate_proj, original.up_proj
        self.down_proj = original.down_proj
        silu = _GATES[type(original.act_fn).__name__] == "silu"
        self._gate: Callable[[Tensor, Tensor], Tensor] = ops.silu_mul if silu else ops.gelu_mul
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        out: Tensor = self.down_proj(self._gate(self.gate_proj(x), self.up_proj(x)))
        return out


class KernelModel(Protocol):
    """What is asked of a model here."""

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules."""
        ...


@dataclass(frozen=True)
class InstalledKernels:
    """What was put in place.

    Args:
        name: `liger` or `torch`.
        reason: Why.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"kernels: {self.name} ({self.reason})"


def install_kernels(
    model: KernelModel,
    *,
    wanted: Literal["auto", "liger", "torch"],
    fused: bool,
    device: torch.device,
    ops: Ops | None = None,
    trial: bool = True,
) -> InstalledKernels:
    """Replaces a language model's norms and gates, where that is wanted and possible.

    Args:
        model: On its device, adapters in place; changed in place.
        wanted: `train.kernels` of the recipe.
        fused: Whether the decoder's layers run fused, which brings kernels of our own.
        device: Where it runs.
        ops: The kernels; liger's when left out.
        trial: Try each kind of replacement beside the original; not for a model without numbers.

    Raises:
        ModelError: They are asked for, and the layers run fused or have nothing to replace.
        DeviceError: They are asked for on a device without Triton.
        MissingExtraError: They are asked for and liger-kernel is not installed.
    """
    obstacle = _obstacle(wanted, fused=fused, device=device, given=ops is not None)
    if obstacle is not None:
        return InstalledKernels("torch", obstacle)
    assert isinstance(model, nn.Module)
    replaced, refused = _replace(
        model, model.module_map.prefixes("language"), ops or LigerOps(), trial=trial
    )
    if not replaced:
        if wanted == "liger":
            raise ModelError(
                "the language model has no norm or gated MLP that liger-kernel computes",
                where="train.kernels",
                got=_listed(refused) or "none known",
                fix="set train.kernels=torch",
            )
        return InstalledKernels("torch", "no norm or gate of this model is known")
    said = _listed(replaced)
    if refused:
        said += f"; as they are: {_listed(refused)}"
    return InstalledKernels("liger", said)


def _obstacle(wanted: str, *, fused: bool, device: torch.device, given: bool) -> str | None:
    """Returns why the kernels stay out; raises where they were asked for by name."""
    asked = wanted == "liger"
    if wanted == "torch":
        return "as the recipe says"
    if fused:
        if asked:
            raise ModelError(
                "the decoder's layers run fused, by kernels of vistune's own",
                where="train.kernels",
                got="liger",
                fix="set train.kernels=auto, or train.fused=off",
            )
        return "fused layers bring their own"
    if given:
        return None
    if asked:
        require_liger(device)
    if not has_triton(device):
        return f"Triton does not run on {device.type}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'vistune[kernels]'"
    return None


def require_liger(device: torch.device) -> None:
    """Refuses liger-kernel where it is not there or cannot run; imports nothing.

    Raises:
        DeviceError: Triton does not compile for the device.
        MissingExtraError: The package is not installed.
    """
    if not has_triton(device):
        raise DeviceError(
            "liger-kernel needs a device that Triton compiles for",
            where="train.kernels",
            got=str(device),
            fix="set train.kernels=auto",
        )
    if find_spec("liger_kernel") is None:
        raise MissingExtraError.of("liger_kernel", extra="kernels", purpose="train.kernels=liger")


def has_liger() -> bool:
    """Whether liger-kernel is installed; imports nothing."""
    return find_spec("liger_kernel") is not None


def _replace(
    model: nn.Module, prefixes: tuple[str, ...], ops: Ops, *, trial: bool
) -> tuple[Counter[str], Counter[str]]:
    """Replaces what passes its trial; returns what was replaced and what was not, by class."""
    replaced: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    passed: dict[tuple[str, bool], bool] = {}
    inside = tuple(prefix.rstrip(".") + "." for prefix in prefixes)
    for name, module in list(model.named_modules()):
        if not name.startswith(inside) or not (_is_norm(module) or _is_gate(module)):
            continue
        kind = type(module).__name__
        made = KernelNorm(module, ops) if _is_norm(module) else KernelGate(module, ops)
        # Layers of a class are alike: each class is tried once, trained and frozen apart.
        key = (kind, any(p.requires_grad for p in module.parameters()))
        if key not in passed:
            passed[key] = not trial or _agrees(module, made)
        if not passed[key]:
            refused[kind] += 1
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        replaced[kind] += 1
    return replaced, refused


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"]


def _is_gate(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return (
        children.keys() == _GATED_MLP
        and type(children["act_fn"]).__name__ in _GATES
        and not list(module.parameters(recurse=False))
    )


def _eps_of(norm: Any) -> float:
    """Returns a norm's epsilon, which transformers' classes name in one of two ways."""
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)


@torch.no_grad()
def _agrees(original: nn.Module, made: nn.Module) -> bool:
    """Whether a replacement gives the original's numbers on drawn input."""
    weight = next(original.parameters())
    width = weight.shape[0] if _is_norm(original) else _in_features(original)
    # Weights held in 8 or 4 bits are no numbers to compute in: there may be none but them.
    formats = [p.dtype for p in original.parameters() if p.dtype in _TOLERANCE]
    dtype = formats[0] if formats else torch.bfloat16
    # A generator of its own: a run's randomness must not depend on what is tried out.
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(8, width, generator=drawn).to(weight.device, dtype)
    training = original.training
    original.eval()
    made.eval()
    try:
        expected, found = original(x), made(x)
    finally:
        original.train(training)
        made.train(training)
    largest = expected.abs().max().clamp(min=1e-6)
    return float((expected - found).abs().max() / largest) <= _TOLERANCE[dtype]


def _in_features(mlp: Any) -> int:
    return int(mlp.gate_proj.in_features)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
