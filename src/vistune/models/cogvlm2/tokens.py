"""Which tokens are image tokens, which expert sees each token, and where each token stands.

An image is a run of K token slots: a begin mark, K - 2 patches, an end mark. Two rules of the
public model surprise: the experts' split is shifted by one (the begin mark and the patches go to
the vision expert, the end mark to the language expert), and all patches of an image share one
position, so an image takes three positions however many tokens it has.

The rules are written here by a slot's place inside its image, not by its neighbours. For the
public inputs (one image between text) that is the same; it also holds for two images side by
side and for samples packed into one row, where neighbours would be the wrong ones to ask.

Source: CogVLM2-Llama3-chat-19B, remote code (expert mask and position ids).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def vision_expert_mask(is_image_BT: Tensor, *, num_image_tokens: int) -> Tensor:
    """Says which tokens the vision experts compute.

    Args:
        is_image_BT: bool [B, T], True at image slots; every image has all its slots in one row.
        num_image_tokens: Slots of one image (K).

    Returns:
        bool [B, T]: begin marks and patches.
    """
    return is_image_BT & (_slot(is_image_BT, num_image_tokens) < num_image_tokens - 1)


def position_ids(
    is_image_BT: Tensor,
    *,
    num_image_tokens: int,
    attention_mask_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Positions for the rotary embedding: patches of an image share one.

    Args:
        is_image_BT: bool [B, T], True at image slots.
        num_image_tokens: Slots of one image (K).
        attention_mask_BT: [B, T], 0 at padding: padding does not advance the position. Left
            padding makes the first real token 1, as in the public model.
        cu_seqlens: int32 [S + 1], for a packed row (B = 1): every sample starts at 0.

    Returns:
        int64 [B, T].
    """
    slot_BT = _slot(is_image_BT, num_image_tokens)
    shares_BT = is_image_BT & (slot_BT > 1) & (slot_BT < num_image_tokens - 1)
    step_BT = ~shares_BT
    if attention_mask_BT is not None:
        step_BT = step_BT & attention_mask_BT.bool()
    total_BT = step_BT.long().cumsum(dim=1)
    if cu_seqlens is None:
        return total_BT - step_BT[:, :1].long()
    starts_S = cu_seqlens[:-1].long()
    lengths_S = cu_seqlens.diff()
    num_tokens = int(is_image_BT.shape[1])
    before_T = torch.repeat_interleave(total_BT[0, starts_S], lengths_S, output_size=num_tokens)
    return total_BT - before_T


def _slot(is_image_BT: Tensor, num_image_tokens: int) -> Tensor:
    """Place of each image slot inside its image, 0 to K - 1; of no meaning elsewhere."""
    rank = is_image_BT.flatten().long().cumsum(dim=0) - 1
    return (rank % num_image_tokens).view_as(is_image_BT)


@dataclass(frozen=True, slots=True)
class ExpertRoute:
    """The order in which the decoder's token-wise work is done: language tokens, then vision.

    Norms, projections and MLPs do not care about the order of tokens, so the decoder keeps its
    hidden states in this order and each expert reads one contiguous slice: nothing is computed
    twice, nothing is masked. Only attention needs the order of the text.

    Args:
        num_tokens: Tokens in all.
        num_language: Tokens of the language experts.
        order_T: int64; place in the text of the t-th token of the route. None: the text's order.
        rank_T: int64; place in the route of the t-th token of the text. None: the text's order.
    """

    num_tokens: int
    num_language: int
    order_T: Tensor | None = None
    rank_T: Tensor | None = None

    @classmethod
    def text(cls, num_tokens: int) -> ExpertRoute:
        """Returns the route of tokens that are all the language experts'."""
        return cls(num_tokens=num_tokens, num_language=num_tokens)

    @classmethod
    def of(cls, is_vision_T: Tensor, *, num_vision: int) -> ExpertRoute:
        """Returns the route of a mask.

        Args:
            is_vision_T: bool [T], True at the vision experts' tokens.
            num_vision: How many are True; given, so that no accelerator has to be waited for.
        """
        num_tokens = int(is_vision_T.shape[0])
        order_T = torch.argsort(is_vision_T.to(torch.uint8), stable=True)
        rank_T = torch.empty_like(order_T)
        rank_T[order_T] = torch.arange(num_tokens, device=order_T.device)
        return cls(num_tokens, num_tokens - num_vision, order_T, rank_T)

    @property
    def num_vision(self) -> int:
        """Tokens of the vision experts."""
        return self.num_tokens - self.num_language

    def to_route(self, x_TD: Tensor) -> Tensor:
        """Puts rows that stand in the text's order into the route's."""
        if self.order_T is None or self.rank_T is None:
            return x_TD
        return permute_rows(x_TD, self.order_T, self.rank_T)

    def to_text(self, x_TD: Tensor) -> Tensor:
        """Puts rows that stand in the route's order into the text's."""
        if self.order_T is None or self.rank_T is None:
            return x_TD
        return permute_rows(x_TD, self.rank_T, self.order_T)


class _PermuteRows(torch.autograd.Function):
    """`x[order]` whose gradient is a gather as well; plain indexing would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_T: Tensor, rank_T: Tensor) -> Tensor:
        ctx.save_for_backward(rank_T)
        return x_TD.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rank_T,) = ctx.saved_tensors
        return grads[0].index_select(0, rank_T), None, None


def permute_rows(x_TD: Tensor, order_T: Tensor, rank_T: Tensor) -> Tensor:
    """Returns `x_TD[order_T]`; `rank_T` is the inverse permutation of `order_T`."""
    out: Tensor = _PermuteRows.apply(x_TD, order_T, rank_T)  # type: ignore[no-untyped-call]
    return out
