"""ChatGLM's two-dimensional rotary embedding and its prefix-LM attention. No weights live here.

Two forms of the same attention: `masked_attention` for padded batches and decoding with a cache,
and `packed_attention` for rows of samples laid end to end. The packed form never builds a T x T
mask: the prompts attend to themselves without a mask, the answers causally to all that precedes
them, each sample on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from vistune.models.chatglm.configuration import ChatGLMConfig


@dataclass(frozen=True)
class PackedPrefixes:
    """Where the samples of a packed row and their prompts lie.

    Args:
        spans: Per sample: first token, first answer token, one past the last token.
        prompt_index: int64; the places of all prompt tokens in the row.
        answer_index: int64; the places of all answer tokens.
        restore_index: int64 [T]; takes prompt tokens followed by answer tokens back to row order.
        cu_prompts: int32 [S + 1]; bounds of the samples' prompts among all prompt tokens.
        cu_answers: int32 [S + 1]; bounds of the samples' answers among all answer tokens.
        cu_seqlens: int32 [S + 1]; bounds of the samples in the row.
    """

    spans: tuple[tuple[int, int, int], ...]
    prompt_index: Tensor
    answer_index: Tensor
    restore_index: Tensor
    cu_prompts: Tensor
    cu_answers: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(
        cls, positions_B2T: Tensor, prompt_lengths: Tensor, cu_seqlens: Tensor
    ) -> PackedPrefixes:
        """Builds the description of a row from what `packed_positions` returns.

        Args:
            positions_B2T: int64 [1, 2, T].
            prompt_lengths: int64 [S].
            cu_seqlens: int32 [S + 1].
        """
        is_answer_T = positions_B2T[0, 1] > 0
        prompt_index, answer_index = (~is_answer_T).nonzero()[:, 0], is_answer_T.nonzero()[:, 0]
        answer_lengths = cu_seqlens.diff() - prompt_lengths
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        bounds = torch.stack((starts, starts + prompt_lengths, ends), dim=1).tolist()
        return cls(
            spans=tuple((start, middle, end) for start, middle, end in bounds),
            prompt_index=prompt_index,
            answer_index=answer_index,
            restore_index=torch.cat((prompt_index, answer_index)).argsort(),
            cu_prompts=_bounds(prompt_lengths),
            cu_answers=_bounds(answer_lengths),
            cu_seqlens=cu_seqlens.int(),
        )


def _bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def rotary_tables(positions_B2T: Tensor, config: ChatGLMConfig) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines that rotate queries and keys.

    The first half of every head turns with the first position, the second half with the second.

    Args:
        positions_B2T: int64 [B, 2, T].
        config: Gives the head width and the angles' number format.

    Returns:
        cos, sin: each fp32 [B, 1, T, 2, head_dim / 2].

    Source:
        ChatGLM-6B: base 10000, frequencies rounded to half precision when they are created.
    """
    width = config.head_dim // 2
    device = positions_B2T.device
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    frequencies = (1.0 / 10_000**exponents).half()
    if config.rotary_angle_dtype == "float16":
        angles = (positions_B2T[..., None].half() * frequencies).float()
    else:
        angles = positions_B2T[..., None].float() * frequencies.float()
    angles = torch.cat((angles, angles), dim=-1).transpose(1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotate(states_BHTD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys, in fp32.

    Args:
        states_BHTD: [B, H, T, head_dim].
        tables: What `rotary_tables` returned.
    """
    cos, sin = tables
    halves = states_BHTD.float().reshape(*states_BHTD.shape[:-1], 2, -1)
    left, right = halves.chunk(2, dim=-1)
    turned = halves * cos + torch.cat((-right, left), dim=-1) * sin
    return turned.flatten(-2).to(states_BHTD.dtype)


def prefix_mask(
    positions_B2T: Tensor, attention_mask_BT: Tensor | None, *, num_past: int
) -> Tensor:
    """Returns who may look at whom: everyone at the prompt, everyone at what came before.

    Args:
        positions_B2T: int64 [B, 2, Q] of the Q new tokens.
        attention_mask_BT: [B, num_past + Q], 0 at padding; None where nothing is padded.
        num_past: Tokens already in the cache; all of them precede the new ones.

    Returns:
        bool [B, 1, Q, num_past + Q]; True where a query may look at a key.
    """
    num_rows, _, num_new = positions_B2T.shape
    device = positions_B2T.device
    query_place = torch.arange(num_past, num_past + num_new, device=device)[:, None]
    key_place = torch.arange(num_past + num_new, device=device)[None]
    before = (key_place <= query_place)[None].expand(num_rows, -1, -1)
    in_prompt = F.pad(positions_B2T[:, 1] == 0, (num_past, 0))[:, None]
    visible = before | in_prompt
    if attention_mask_BT is not None:
        visible = visible & (attention_mask_BT[:, None] != 0)
        # A padding token still looks at itself: a row of the softmax without any key is NaN.
        visible = visible | (key_place == query_place)
    return visible[:, None]


def masked_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Tensor
) -> Tensor:
    """Attends under a mask of `prefix_mask`; returns [B, H, Q, head_dim]."""
    return F.scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, attn_mask=mask)


def packed_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, prefixes: PackedPrefixes
) -> Tensor:
    """Attends within each sample of a packed row; returns [1, H, T, head_dim]."""
    if query_BHTD.is_cuda and query_BHTD.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query_BHTD, key_BHTD, value_BHTD, prefixes)
    return _per_sample(query_BHTD, key_BHTD, value_BHTD, prefixes)


def _per_sample(query: Tensor, key: Tensor, value: Tensor, prefixes: PackedPrefixes) -> Tensor:
    pieces = []
    for start, middle, end in prefixes.spans:
        prompt = slice(start, middle)
        if middle > start:
            pieces.append(
                F.scaled_dot_product_attention(
                    query[:, :, prompt], key[:, :, prompt], value[:, :, prompt]
                )
            )
        sample = slice(start, end)
        place = torch.arange(start, end, device=query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, middle:end],
                key[:, :, sample],
                value[:, :, sample],
                attn_mask=place[None] <= place[middle - start :, None],
            )
        )
    return torch.cat(pieces, dim=2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, prefixes: PackedPrefixes) -> Tensor:
    query_THD, key_THD, value_THD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    longest_prompt = max(middle - start for start, middle, _ in prefixes.spans)
    longest_answer = max(end - middle for _, middle, end in prefixes.spans)
    longest = max(end - start for start, _, end in prefixes.spans)
    prompts, answers = prefixes.prompt_index, prefixes.answer_index
    prompt_out = varlen_attn(
        query_THD[prompts],
        key_THD[prompts],
        value_THD[prompts],
        prefixes.cu_prompts,
        prefixes.cu_prompts,
        longest_prompt,
        longest_prompt,
    )
    # With fewer queries than keys the causal window is aligned to the end, as answers need it.
    answer_out = varlen_attn(
        query_THD[answers].contiguous(),
        key_THD.contiguous(),
        value_THD.contiguous(),
        prefixes.cu_answers,
        prefixes.cu_seqlens,
        longest_answer,
        longest,
        window_size=(-1, 0),
    )
    assert isinstance(prompt_out, Tensor)
    assert isinstance(answer_out, Tensor)
    out_THD = torch.cat((prompt_out, answer_out))[prefixes.restore_index]
    return out_THD.transpose(0, 1)[None]
