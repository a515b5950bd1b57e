"""Packed attention outside a transformers layer, and the backends by name."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from vistune.errors import ModelError
from vistune.models.attention.contract import Backend, Packing, Scoring
from vistune.models.attention.per_sample import PerSample
from vistune.models.attention.varlen import Varlen
from vistune.types import Tail

BackendName: TypeAlias = Literal["auto", "varlen", "cudnn", "flex", "sdpa", "npu", "flash_attn"]


class Auto:
    """Torch's varlen kernel for every call that it takes, SDPA for each sample otherwise.

    It stands where nothing was chosen: a model loaded to answer, or tried out.
    """

    name = "auto"

    def __init__(self) -> None:
        self._varlen, self._per_sample = Varlen(), PerSample()

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """Takes every call. See `Backend`."""
        return None

    def attend(
        self,
        query_UHD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        packing: Packing,
        scoring: Scoring,
    ) -> Tensor:
        """See `Backend`."""
        fits = self._varlen.refusal(query_UHD, value_THD, scoring) is None
        backend: Backend = self._varlen if fits else self._per_sample
        return backend.attend(query_UHD, key_THD, value_THD, packing, scoring)


AUTO = Auto()


def backend_of(name: BackendName) -> Backend:
    """Returns a way of computing packed attention; what it needs is imported now.

    Args:
        name: Its name in recipes.

    Raises:
        MissingExtraError: Its package is not installed.
    """
    if name == "auto":
        return AUTO
    if name == "varlen":
        return Varlen()
    if name == "sdpa":
        return PerSample()
    if name == "cudnn":
        from vistune.models.attention.cudnn import Cudnn

        return Cudnn()
    if name == "flex":
        from vistune.models.attention.flex import Flex

        return Flex()
    if name == "npu":
        from vistune.models.attention.npu import NpuFusion

        return NpuFusion()
    from vistune.models.attention.flash import FlashAttention

    return FlashAttention()


def attend(
    query_UHD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    packing: Packing,
    scoring: Scoring,
    *,
    backend: Backend,
) -> Tensor:
    """Attends within each sample by a backend, which says so when it cannot.

    Args:
        query_UHD: [U, H, D].
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        packing: Where samples lie.
        scoring: How scores become weights; a window no sample reaches is none.
        backend: How it is computed.

    Returns:
        [U, H, D].

    Raises:
        ModelError: The backend does not take this call.
    """
    if scoring.window is not None and scoring.window >= packing.max_seqlen:
        scoring = Scoring(scoring.scale, None, scoring.softcap, scoring.dropout)
    if scoring.window is not None and not packing.causal:
        raise ModelError("a window looks back: it has no meaning without a causal mask")
    if query_UHD.dtype is not value_THD.dtype:  # rotary tables in fp32 under autocast
        query_UHD, key_THD = query_UHD.to(value_THD.dtype), key_THD.to(value_THD.dtype)
    refusal = backend.refusal(query_UHD, value_THD, scoring)
    if refusal is not None:
        raise ModelError(
            f"attention '{backend.name}' does not take what the model asks of it",
            where="train.attention",
            got=refusal,
            fix="set train.attention=sdpa",
        )
    return backend.attend(query_UHD, key_THD, value_THD, packing, scoring)


def attend_packed(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    backend: Backend = AUTO,
) -> Tensor:
    """Attention within each sample of a packed row, outside a transformers layer.

    Args:
        query_THD: [T, H, D].
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample.
        window: Positions a token sees, itself included; None for all before it.
        causal: Whether a position sees only itself and what is before it; a vision tower's
            patches see all of their image.
        scale: Factor on the scores; 1 / sqrt(D) when None.
        softcap: Scores are squashed into (-softcap, softcap).
        backend: How it is computed.

    Returns:
        [T, H, D].
    """
    return attend(
        query_THD,
        key_THD,
        value_THD,
        Packing(cu_seqlens, max_seqlen, causal),
        Scoring(scale, window, softcap),
        backend=backend,
    )


def attend_tail(
    query_UHD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    *,
    tail: Tail,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: Backend = AUTO,
) -> Tensor:
    """Causal attention of the last positions of each sample of a packed row.

    Args:
        query_UHD: [U, H, D]; for each sample its last positions.
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        tail: Where the queries stand.
        cu_seqlens: int32 [S + 1], boundaries of the keys.
        max_seqlen: Tokens of the longest sample.
        window: Positions a token sees, itself included; None for all before it.
        scale: Factor on the scores; 1 / sqrt(D) when None.
        softcap: Scores are squashed into (-softcap, softcap).
        backend: How it is computed.

    Returns:
        [U, H, D].
    """
    packing = Packing(
        cu_seqlens, max_seqlen, cu_queries=tail.cu_seqlens, max_queries=tail.max_seqlen
    )
    scoring = Scoring(scale, window, softcap)
    return attend(query_UHD, key_THD, value_THD, packing, scoring, backend=backend)
