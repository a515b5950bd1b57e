"""AdamW whose state lives in the host's memory and visits the device piece by piece.

The update runs on the device, by the same kernel as without offload, so the numbers are the same
bits; one piece of state in use, one coming and one going are on the device at a time. Gradients and
weights stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vistune.device.transfer import Transfer
from vistune.recipe.sizes import OFFLOAD_PIECE_WEIGHTS

_IN_FLIGHT = 1


@dataclass
class _Block:
    """Neighbouring parameters of one group with their moments in one piece of host memory.

    Args:
        group: Their parameter group.
        parameters: They.
        starts: Where each begins.
        moments: [2, number of weights]: first and second moments.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    starts: list[int]
    moments: Tensor


@dataclass
class _Piece:
    """What is updated at a time: a range of a block."""

    block: _Block
    start: int
    stop: int

    def slices(self) -> Iterator[tuple[Tensor, Tensor, int, int, int]]:
        """Yields each parameter with its gradient, and the range of both and of the piece."""
        for parameter, begin in zip(self.block.parameters, self.block.starts, strict=True):
            first = max(self.start, begin)
            last = min(self.stop, begin + parameter.numel())
            if first < last and parameter.grad is not None:
                yield parameter, parameter.grad, first - begin, last - begin, first - self.start


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW with its moments in the host's memory.

    Args:
        params: Parameter groups; their parameters are contiguous and on one device.
        betas: Decay rates.
        eps: Epsilon.
        piece_weights: Weights whose moments are on the device at a time.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        piece_weights: int = OFFLOAD_PIECE_WEIGHTS,
    ) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._piece_weights = piece_weights
        self._blocks: list[_Block] = []
        first = next(p for group in self.param_groups for p in group["params"])
        self._transfer = Transfer(first.device)

    def _allocate(self) -> None:
        """Makes the moments, zero, at the first update or when a checkpoint is loaded."""
        if self._blocks:
            return
        for group in self.param_groups:
            for parameters in _packed(group["params"], self._piece_weights):
                self._blocks.append(self._block(group, parameters))

    def _block(self, group: dict[str, Any], parameters: list[Tensor]) -> _Block:
        counts = [p.numel() for p in parameters]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        moments = self._transfer.host_empty(2, sum(counts), dtype=parameters[0].dtype).zero_()
        for parameter, start, count in zip(parameters, starts, counts, strict=True):
            first, second = (row[start : start + count].view_as(parameter) for row in moments)
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
        return _Block(group, parameters, starts, moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None, "the loss is computed before"
        self._allocate()
        pieces = list(self._pieces())
        coming = self._fetch(pieces[0]) if pieces else None
        going: list[tuple[Tensor, Any]] = []
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            assert coming is not None
            moments, ready = coming
            self._transfer.wait(ready)
            coming = None if following is None else self._fetch(following)
            self._update(piece, moments)
            going.append((moments, self._send(piece, moments)))
            while len(going) > _IN_FLIGHT:
                self._transfer.wait(going.pop(0)[1])
        for _, sent in going:
            self._transfer.wait(sent)
        # A checkpoint reads the moments on the host: they have to be there.
        self._transfer.finish()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1

    def _pieces(self) -> Iterator[_Piece]:
        for block in self._blocks:
            count = block.moments.shape[1]
            # A CPU has nothing to copy, and its kernel rounds differently at ends of a range.
            size = count if self._transfer.is_plain else self._piece_weights
            for start in range(0, count, size):
                yield _Piece(block, start, min(start + size, count))

    def _fetch(self, piece: _Piece) -> tuple[Tensor, Any]:
        moments = piece.block.moments[:, piece.start : piece.stop]
        if self._transfer.is_plain:
            return moments, None
        return self._transfer.copy_in(moments)

    def _send(self, piece: _Piece, moments: Tensor) -> Any:
        if self._transfer.is_plain:
            return None
        return self._transfer.copy_out(moments, piece.block.moments[:, piece.start : piece.stop])

    def _update(self, piece: _Piece, moments: Tensor) -> None:
        group = piece.block.group
        slices = list(piece.slices())
        if not slices:
            return
        done = [float(self.state[parameter]["step"]) for parameter, *_ in slices]
        adamw(
            [p.view(-1)[a:b] for p, _, a, b, _ in slices],
            [g.reshape(-1)[a:b] for _, g, a, b, _ in slices],
            [moments[0, at : at + b - a] for _, _, a, b, at in slices],
            [moments[1, at : at + b - a] for _, _, a, b, at in slices],
            [],
            list(self._steps(done).unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _steps(self, done: list[float]) -> Tensor:
        """Updates done by each slice's parameter, where the kernel wants them."""
        device = self._transfer.device
        if len(set(done)) == 1:
            return torch.full((len(done),), done[0], device=device)
        return torch.tensor(done, device=device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts a checkpoint's state into the host's memory, never all of it on the device."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._blocks.clear()
        if not state_dict["state"]:
            return
        self._allocate()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, entries in state_dict["state"].items():
            own = self.state[parameters[index]]
            for key, value in entries.items():
                own[key].copy_(value)


def _packed(parameters: list[Tensor], num_weights: int) -> Iterator[list[Tensor]]:
    """Yields neighbours that together have at most `num_weights` weights, or one larger one."""
    held: list[Tensor] = []
    for parameter in parameters:
        if held and sum(p.numel() for p in held) + parameter.numel() > num_weights:
            yield held
            held = []
        held.append(parameter)
    if held:
        yield held
