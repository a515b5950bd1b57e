"""ChatGLM's two position ids of every token, and where each prompt ends, from the token ids.

A sequence is a prompt (up to, not including, the first `<sop>`) and an answer (from `<sop>` on).
Prompt tokens count 0, 1, 2 ... in the first position and 0 in the second. Answer tokens all carry
the place of the mask token (`[gMASK]`, else `[MASK]`) in the first position and count 1, 2, 3 ...
in the second. So a second position of 0 marks the prompt, whose tokens everyone may look at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.chatglm.configuration import ChatGLMConfig


def padded_positions(
    input_ids_BT: Tensor, attention_mask_BT: Tensor | None, config: ChatGLMConfig
) -> Tensor:
    """Returns the positions of a padded batch.

    Args:
        input_ids_BT: int64 [B, T].
        attention_mask_BT: [B, T], 0 at padding (either side), or None where nothing is padded.
        config: Names the special ids.

    Returns:
        int64 [B, 2, T]; 0 at padding.

    Raises:
        ModelError: A row has no `<sop>`, or neither `[gMASK]` nor `[MASK]`.
    """
    num_rows, num_tokens = input_ids_BT.shape
    if attention_mask_BT is None:
        attention_mask_BT = torch.ones_like(input_ids_BT)
    real_BT = attention_mask_BT[:, :num_tokens] != 0
    local_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    row_BT = torch.arange(num_rows, device=input_ids_BT.device)[:, None].expand_as(input_ids_BT)
    positions_2T, _ = _positions(
        input_ids_BT.reshape(-1),
        row_BT.reshape(-1),
        local_BT.reshape(-1),
        real_BT.reshape(-1),
        num_samples=num_rows,
        config=config,
    )
    positions_2BT = positions_2T.view(2, num_rows, num_tokens) * real_BT
    return positions_2BT.transpose(0, 1)


def packed_positions(
    input_ids_BT: Tensor, cu_seqlens: Tensor, config: ChatGLMConfig
) -> tuple[Tensor, Tensor]:
    """Returns the positions of a packed row and the length of each sample's prompt.

    Args:
        input_ids_BT: int64 [1, T].
        cu_seqlens: int32 [S + 1].
        config: Names the special ids.

    Returns:
        positions_B2T: int64 [1, 2, T].
        prompt_lengths: int64 [S].

    Raises:
        ModelError: A sample has no `<sop>`, or neither `[gMASK]` nor `[MASK]`.
    """
    num_tokens = input_ids_BT.shape[1]
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.long().diff()
    index_T = torch.arange(num_tokens, device=input_ids_BT.device)
    sample_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=num_tokens
    )
    positions_2T, prompt_lengths = _positions(
        input_ids_BT[0],
        sample_T,
        index_T - starts[sample_T],
        torch.ones_like(index_T, dtype=torch.bool),
        num_samples=len(lengths),
        config=config,
    )
    return positions_2T[None], prompt_lengths


def _positions(
    ids_T: Tensor,
    sample_T: Tensor,
    local_T: Tensor,
    real_T: Tensor,
    *,
    num_samples: int,
    config: ChatGLMConfig,
) -> tuple[Tensor, Tensor]:
    absent = ids_T.numel() + 1

    def first(token_id: int) -> Tensor:
        found_T = torch.where((ids_T == token_id) & real_T, local_T, absent)
        start = torch.full((num_samples,), absent, device=ids_T.device)
        return start.scatter_reduce(0, sample_T, found_T, reduce="amin")

    prompt_S = first(config.bos_token_id)
    gmask_S = first(config.gmask_token_id)
    mask_S = torch.where(gmask_S < absent, gmask_S, first(config.mask_token_id))
    incomplete = ((prompt_S == absent) | (mask_S == absent)).nonzero().flatten().tolist()
    if incomplete:
        raise ModelError(
            f"{len(incomplete)} of {num_samples} samples lack the tokens that end the prompt, "
            f"the first of them sample {incomplete[0]}",
            expected=f"[gMASK] (id {config.gmask_token_id}) followed by "
            f"<sop> (id {config.bos_token_id})",
            fix="encode prompts with the ChatGLM tokenizer, which ends them with both, "
            "and do not cut them off",
        )
    answer_T = local_T >= prompt_S[sample_T]
    first_T = torch.where(answer_T, mask_S[sample_T], local_T)
    second_T = (local_T - prompt_S[sample_T] + 1).clamp(min=0)
    return torch.stack((first_T, second_T)), prompt_S
