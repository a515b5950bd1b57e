"""What a way of computing attention over packed rows is: its input, its answer, its refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed row lie.

    Args:
        cu_seqlens: int32 [S + 1], boundaries of the keys.
        max_seqlen: Tokens of the longest sample.
        causal: Whether a position sees only itself and what is before it.
        cu_queries: int32 [S + 1], boundaries of the queries, when there are queries for the last
            positions of each sample only; they are aligned to the sample's end.
        max_queries: Queries of the sample with most of them.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool = True
    cu_queries: Tensor | None = None
    max_queries: int | None = None


@dataclass(frozen=True)
class Scoring:
    """How scores become weights.

    Args:
        scale: Factor on the scores; 1 / sqrt(D) when None.
        window: Positions a token sees, itself included; None for all of its sample.
        softcap: Scores are squashed into (-softcap, softcap).
        dropout: Probability of dropping a weight.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


class Backend(Protocol):
    """One way of computing attention over packed rows."""

    @property
    def name(self) -> str:
        """Its name in recipes."""
        ...

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """Returns why it cannot take a call, or None when it can.

        Args:
            query_UHD: [U, H, D].
            value_THD: [T, H_kv, D].
            scoring: How scores become weights.
        """
        ...

    def attend(
        self,
        query_UHD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        packing: Packing,
        scoring: Scoring,
    ) -> Tensor:
        """Attends within each sample.

        Args:
            query_UHD: [U, H, D]; U is T unless there are queries for the samples' ends only.
            key_THD: [T, H_kv, D]; H is a multiple of H_kv.
            value_THD: [T, H_kv, D].
            packing: Where samples lie.
            scoring: How scores become weights.

        Returns:
            [U, H, D].
        """
        ...


_Value = TypeVar("_Value")


class RowMemo(Generic[_Value]):
    """What was worked out for the row at hand, so that it is done once and not in every layer.

    The boundaries are held: another row's can never come to lie at the same address meanwhile.
    """

    def __init__(self) -> None:
        self._found: list[tuple[tuple[Tensor | None, ...], tuple[object, ...], _Value]] = []

    def get(
        self, packing: Packing, *also: object, make: Callable[[], _Value], keep: int = 4
    ) -> _Value:
        """Returns what `make` returns for a row, from memory when it was made before.

        Args:
            packing: The row.
            also: What else the value depends on.
            make: Works it out.
            keep: Values held at a time.
        """
        tensors = (packing.cu_seqlens, packing.cu_queries)
        if any(t is not None and t.is_inference() for t in tensors):
            return make()  # such tensors do not say when they change
        key = (*(_identity(t) for t in tensors), packing.max_seqlen, packing.causal, *also)
        for _, known, value in self._found:
            if known == key:
                return value
        value = make()
        self._found = [(tensors, key, value), *self._found[: keep - 1]]
        return value


def _identity(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version
