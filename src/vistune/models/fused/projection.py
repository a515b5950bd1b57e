"""A linear map, whole or several merged into one product, with optional LoRA adapters.

A frozen base weight is held once in the model's own format, or in FP8 (`fp8`). A trained one is
held in fp32, in the storage its parameters are views of; it is rounded to the activations' format
when it is read, so there is no second copy that could fall behind, and its gradient leaves the
matrix product in fp32.

Adapters with dropout read their input through a mask that is made again from its seed wherever it
is wanted. Adapters merged into one product read through one mask, where PEFT draws one for each:
each still drops what it reads with the same probability, but they no longer drop independently of
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune.models.fused.fp8 import Fp8Weight
from vistune.models.fused.torch_ops import Operand


@dataclass
class Adapter:
    """One LoRA adapter on the output rows `start` to `stop` of a projection.

    Args:
        down_RI: The factor A, [rank, in].
        up_OR: The factor B, [stop - start, rank].
        scale: alpha / rank, or as the adapter defines it.
        start: First output row.
        stop: One past the last output row.
        dropout: PEFT's module in front of it, whose probability and mode are read, if it has one.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    start: int
    stop: int
    dropout: nn.Dropout | None = None


class Drop(NamedTuple):
    """What is dropped of the input that a projection's adapters read, in one call of a layer.

    Args:
        p: Probability.
        seed: Of the mask.
    """

    p: float
    seed: int


class Lowrank(NamedTuple):
    """What the backward pass of a projection's adapters reads beside their input.

    Args:
        inner_TR: Their inner values, [T, sum of ranks].
        drop: What was dropped of the input, if anything was.
    """

    inner_TR: Tensor
    drop: Drop | None


@dataclass
class Trained:
    """A base weight or bias that trains: it is the rows `start` to `stop` of the merged one.

    Args:
        parameter: float32, a view of the merged storage.
        start: First output row.
        stop: One past the last output row.
    """

    parameter: Tensor
    start: int
    stop: int


@dataclass(eq=False)
class Projection:
    """y = x W^T + b, and the adapters' share of it.

    Args:
        weight_OI: [out, in], float32 where it trains, or None once it is held in FP8.
        bias_O: [out] or None.
        adapters: In output order, not overlapping.
        weights: What of the weight trains, in output order: all of it or nothing.
        biases: What of the bias trains: all of it or nothing.
        held_back: First output row, and one past the last, whose bias the caller adds.
    """

    weight_OI: Tensor | None
    bias_O: Tensor | None = None
    adapters: Sequence[Adapter] = ()
    weights: Sequence[Trained] = ()
    biases: Sequence[Trained] = ()
    held_back: tuple[int, int] | None = None
    fp8: Fp8Weight | None = field(default=None, init=False)

    def parameters(self) -> list[Tensor]:
        """Returns what trains, in the order of `gradients`."""
        own = [t.parameter for t in (*self.weights, *self.biases)]
        return own + [t for a in self.adapters for t in (a.down_RI, a.up_OR)]

    @property
    def holds_parameters(self) -> bool:
        """Whether trained parameters still are views of what the products read.

        They no longer are when a model was moved, cast or loaded anew after it was fused: it would
        go on computing with the old numbers.
        """
        return all(
            t.parameter.data_ptr() == whole.data_ptr() + t.start * whole.stride(0) * 4
            for whole, trained in ((self.weight_OI, self.weights), (self.bias_O, self.biases))
            for t in trained
            if whole is not None
        )

    def to_fp8(self, channels_C: Tensor | None, ops: ModuleType) -> None:
        """Replaces the weight by its FP8 form.

        Args:
            channels_C: int32 [C], the channels of the input held twice, or None.
            ops: The elementwise kernels.
        """
        assert self.weight_OI is not None
        self.fp8 = Fp8Weight.of(self.weight_OI, channels_C, ops)
        self.weight_OI = None

    @property
    def channels(self) -> Tensor | None:
        """Channels of the input that are held twice: int32 [C]."""
        return None if self.fp8 is None else self.fp8.channels_C

    @property
    def row_scale(self) -> Tensor | None:
        """Scales of the output rows of an FP8 weight: float32 [out]."""
        return None if self.fp8 is None else self.fp8.scale_O

    def split(self, at: int) -> tuple[Projection, Projection]:
        """Returns the map's first `at` outputs and the others as two maps over the same storage."""
        assert self.weight_OI is not None
        halves = []
        for start, stop in ((0, at), (at, self.num_outputs)):
            bias = None if self.bias_O is None else self.bias_O[start:stop]
            adapters = tuple(
                replace(a, start=a.start - start, stop=a.stop - start)
                for a in self.adapters
                if start <= a.start and a.stop <= stop
            )
            weights, biases = (
                tuple(
                    Trained(t.parameter, t.start - start, t.stop - start)
                    for t in trained
                    if start <= t.start and t.stop <= stop
                )
                for trained in (self.weights, self.biases)
            )
            half = Projection(self.weight_OI[start:stop], bias, adapters, weights, biases)
            if self.held_back is not None and start <= self.held_back[0] < stop:
                assert self.held_back[1] <= stop
                half.held_back = (self.held_back[0] - start, self.held_back[1] - start)
            halves.append(half)
        for name in ("adapters", "weights", "biases"):
            assert sum(len(getattr(half, name)) for half in halves) == len(getattr(self, name))
        return halves[0], halves[1]

    @property
    def num_outputs(self) -> int:
        """Width of the result."""
        if self.fp8 is not None:
            return self.fp8.scale_O.shape[0]
        assert self.weight_OI is not None
        return self.weight_OI.shape[0]

    @property
    def is_fp8(self) -> bool:
        """Whether the products read FP8."""
        return self.fp8 is not None

    @property
    def reads_plain(self) -> bool:
        """Whether something here reads the activations in the model's own format."""
        return not self.is_fp8 or bool(self.adapters)

    @property
    def reads_again(self) -> bool:
        """Whether the backward pass reads the input of the forward pass."""
        return bool(self.adapters or self.weights)

    def draw(self) -> Drop | None:
        """Draws what a call drops, from torch's CPU generator: no device is waited for.

        Returns:
            None, and nothing is drawn, where nothing drops: no dropout, or evaluation.
        """
        modules = [a.dropout for a in self.adapters if a.dropout is not None]
        found = {module.p if module.training else 0.0 for module in modules}
        assert len(found) <= 1, "adapters of one product drop differently"
        p = found.pop() if found else 0.0
        return Drop(p, int(torch.randint(2**62, (), device="cpu"))) if p > 0 else None

    def forward(
        self,
        x: Operand,
        ops: ModuleType,
        *,
        drop: Drop | None = None,
        residual_TO: Tensor | None = None,
    ) -> tuple[Tensor, Lowrank | None]:
        """Applies the map.

        Args:
            x: [T, in].
            ops: The elementwise kernels.
            drop: What the adapters do not see of it.
            residual_TO: Added to the result.

        Returns:
            [T, out], and what the adapters' backward pass reads.
        """
        if not self.adapters:
            return self._product(x, ops, residual_TO), None
        x_TI = plain_form(x)
        lowrank = _seen(x_TI, drop, ops) @ self._downs(x_TI.dtype).t()
        if self.is_fp8 or not self._adapted_throughout:
            y = self._product(x, ops, residual_TO)
            self._add_adapters(y, y, lowrank)
            return y, Lowrank(lowrank, drop)
        # The small products first: the large one then adds to their result while it computes,
        # where adding theirs to its own would read and write the result once more.
        if residual_TO is None:
            y = x_TI.new_empty(x_TI.shape[0], self.num_outputs)
            self._add_adapters(y, None, lowrank)
        else:
            y = torch.empty_like(residual_TO)
            self._add_adapters(y, residual_TO, lowrank)
        y.addmm_(x_TI, self._weight(x_TI.dtype).t())
        return self._biased(y), Lowrank(lowrank, drop)

    @property
    def _adapted_throughout(self) -> bool:
        edges = [0, *(a.stop for a in self.adapters)]
        return edges[-1] == self.num_outputs and edges[:-1] == [a.start for a in self.adapters]

    def _add_adapters(self, out_TO: Tensor, to_TO: Tensor | None, lowrank_TR: Tensor) -> None:
        """Writes the adapters' share into `out_TO`, added to `to_TO` where that is given."""
        at = 0
        for adapter in self.adapters:
            rank, rows = adapter.down_RI.shape[0], slice(adapter.start, adapter.stop)
            out = out_TO[:, rows]
            torch.addmm(
                out if to_TO is None else to_TO[:, rows],
                lowrank_TR[:, at : at + rank],
                adapter.up_OR.to(out.dtype).t(),
                beta=0 if to_TO is None else 1,
                alpha=adapter.scale,
                out=out,
            )
            at += rank

    def _downs(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([adapter.down_RI.to(dtype) for adapter in self.adapters])

    def _weight(self, dtype: torch.dtype) -> Tensor:
        assert self.weight_OI is not None
        return self.weight_OI.to(dtype)

    def _biased(self, y: Tensor) -> Tensor:
        bias_O = self._added_bias()
        return y if bias_O is None else y.add_(bias_O)

    def _added_bias(self) -> Tensor | None:
        if self.bias_O is None or self.held_back is None:
            return self.bias_O
        start, stop = self.held_back
        zeros = self.bias_O.new_zeros(stop - start)
        return torch.cat([self.bias_O[:start], zeros, self.bias_O[stop:]])

    def _product(self, x: Operand, ops: ModuleType, residual_TO: Tensor | None) -> Tensor:
        if self.fp8 is not None:
            y = self.fp8.product(x, ops)
            return self._biased(y if residual_TO is None else y.add_(residual_TO))
        x_TI = plain_form(x)
        weight = self._weight(x_TI.dtype)
        if residual_TO is not None:
            return self._biased(torch.addmm(residual_TO, x_TI, weight.t()))
        bias = self._added_bias()
        return F.linear(x_TI, weight, None if bias is None else bias.to(x_TI.dtype))

    def input_gradient(self, grad: Operand, ops: ModuleType) -> Tensor:
        """Returns the gradient of the input through the base weight alone.

        Args:
            grad: Gradient of the output [T, out]; an FP8 form has `scale_O` folded in.
            ops: The elementwise kernels.
        """
        if self.fp8 is not None:
            return self.fp8.input_gradient(grad, ops)
        grad_TO = plain_form(grad)
        return grad_TO @ self._weight(grad_TO.dtype)

    def backward(
        self, grad: Operand, lowrank: Lowrank | None, ops: ModuleType
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of the input.

        Args:
            grad: Gradient of the output [T, out].
            lowrank: From `forward`.
            ops: The elementwise kernels.

        Returns:
            [T, in], and the gradient of the adapters' inner values [T, sum of ranks].
        """
        if lowrank is None:
            return self.input_gradient(grad, ops), None
        grad_TO = plain_form(grad)
        inner_TR = grad_TO.new_empty(
            grad_TO.shape[0], sum(a.down_RI.shape[0] for a in self.adapters)
        )
        at = 0
        for adapter in self.adapters:
            part = inner_TR[:, at : at + adapter.down_RI.shape[0]]
            torch.addmm(
                part, grad_TO[:, adapter.start : adapter.stop], adapter.up_OR.to(part.dtype),
                beta=0, alpha=adapter.scale, out=part,
            )  # fmt: skip
            at += part.shape[1]
        downs = self._downs(inner_TR.dtype)
        drop = lowrank.drop
        if self.is_fp8:
            through_base = self.input_gradient(grad, ops)
            if drop is None:
                return through_base.addmm_(inner_TR, downs), inner_TR
            dx = inner_TR @ downs
            ops.dropout_(dx, p=drop.p, seed=drop.seed, add_TD=through_base)
            return dx, inner_TR
        dx = inner_TR @ downs
        if drop is not None:
            ops.dropout_(dx, p=drop.p, seed=drop.seed)
        return dx.addmm_(grad_TO, self._weight(dx.dtype)), inner_TR

    def gradients(
        self,
        grad: Operand,
        inner_TR: Tensor | None,
        x_TI: Tensor | None,
        lowrank: Lowrank | None,
        ops: ModuleType,
    ) -> list[Tensor]:
        """Gradients of what trains, in the order of `parameters`; empty where nothing does.

        Args:
            grad: Gradient of the output [T, out].
            inner_TR: From `backward`.
            x_TI: The forward input.
            lowrank: From `forward`.
            ops: The elementwise kernels.
        """
        grads: list[Tensor] = []
        if self.weights:
            assert x_TI is not None
            of_weight = weight_gradient(plain_form(grad), x_TI)
            grads += [of_weight[t.start : t.stop] for t in self.weights]
        if self.biases:
            of_bias = plain_form(grad).sum(0, dtype=torch.float32)
            grads += [of_bias[t.start : t.stop] for t in self.biases]
        if lowrank is None:
            return grads
        assert inner_TR is not None and x_TI is not None
        grad_TO = plain_form(grad)
        ranks = [a.down_RI.shape[0] for a in self.adapters]
        downs = torch.split(weight_gradient(inner_TR, _seen(x_TI, lowrank.drop, ops)), ranks)
        inners = torch.split(lowrank.inner_TR, ranks, dim=1)
        for adapter, down, inner in zip(self.adapters, downs, inners, strict=True):
            up = weight_gradient(grad_TO[:, adapter.start : adapter.stop], inner)
            grads += [
                down.to(adapter.down_RI.dtype),
                up.mul_(adapter.scale).to(adapter.up_OR.dtype),
            ]
        return grads


def _seen(x_TI: Tensor, drop: Drop | None, ops: ModuleType) -> Tensor:
    """Returns what adapters see of their input."""
    if drop is None:
        return x_TI
    seen_TI: Tensor = ops.dropout(x_TI, p=drop.p, seed=drop.seed)
    return seen_TI


def weight_gradient(grad_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Returns the gradient of a weight, grad^T x, float32 [out, in]: summed and kept in fp32."""
    if grad_TO.is_cuda and grad_TO.dtype is not torch.float32:
        return torch.mm(grad_TO.t(), x_TI, out_dtype=torch.float32)
    return grad_TO.float().t() @ x_TI.float()


def plain_form(x: Operand) -> Tensor:
    """Returns activations as they are, [T, D]."""
    assert x.plain is not None
    return x.plain


def base_of(linear: nn.Module) -> nn.Linear:
    """Returns the linear layer itself, or the one its adapter stands beside."""
    base: nn.Linear = linear if isinstance(linear, nn.Linear) else linear.base_layer  # type: ignore[assignment]
    return base
