"""Rotary scaling by length that knows where a text begins: no text's angles depend on another's.

With dynamic scaling a text longer than `max_position_embeddings` turns by stretched frequencies,
with LongRoPE by a second set of them. Transformers takes those of the longest text for all rows of
a batch and every sample of a packed row, and keeps stretched ones for what comes later, unless that
is short. Here each run of rising positions is a text of its own, and each forward pass starts anew.

An answer that grows beyond the limit with a cache keeps the keys it has: each token's key is turned
by the frequencies of the length at which it was said, as in InternLM2's public code.

Source: InternLM2-chat-1.8B, config.json and remote code; transformers' rope types "dynamic" and
"longrope".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vistune import _compat

# Decoders that turn heads half against half, by one table: whole ones, or as much as it is wide.
_LIKE_LLAMA = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})


class DynamicRotaryEmbedding(LlamaRotaryEmbedding):  # type: ignore[misc]
    """A drop-in for a decoder's `rotary_emb` whose rope type is "dynamic".

    Transformers knows it by the end of its name, and fills `inv_freq` when it loads a model.
    """

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tables of cosines and sines.

        Args:
            x: Gives the tables' format and device.
            position_ids: int64 [B, T]; where a position does not rise, another text begins.

        Returns:
            cos, sin: each [B, T, head width].
        """
        frequencies = self.inv_freq.to(device=x.device, dtype=torch.float)
        num_pairs = frequencies.shape[0]
        factor = float(self.config.rope_parameters["factor"])
        ratio_BT = _lengths(position_ids) / self.original_max_seq_len
        # base * s -> frequencies / s ** (2 i / d); s is exactly 1 up to the limit.
        stretch_BT = (factor * ratio_BT.clamp(min=1.0) - (factor - 1.0)) ** (
            num_pairs / (num_pairs - 1)
        )
        exponent = torch.arange(num_pairs, device=x.device, dtype=torch.float) / num_pairs
        turns = frequencies / stretch_BT.to(x.device)[..., None] ** exponent
        return _tables(x, position_ids, turns, scaling=self.attention_scaling)


class LongRotaryEmbedding(LlamaRotaryEmbedding):  # type: ignore[misc]
    """The same for the rope type "longrope": two sets of frequencies, one for long texts."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `DynamicRotaryEmbedding.forward`; tables are as wide as the part that turns."""
        limit = int(self.config.rope_parameters["original_max_position_embeddings"])
        set_of = ROPE_INIT_FUNCTIONS["longrope"]
        short, _ = set_of(self.config, x.device, seq_len=limit)
        long, _ = set_of(self.config, x.device, seq_len=limit + 1)
        is_long_BT = _lengths(position_ids).to(x.device) > limit
        turns = torch.where(is_long_BT[..., None], long, short)
        return _tables(x, position_ids, turns, scaling=self.attention_scaling)


def _tables(
    x: Tensor, position_ids_BT: Tensor, turns: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    angles = position_ids_BT[..., None].float() * turns
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def _lengths(position_ids_BT: Tensor) -> Tensor:
    """Returns the length of the text that every position is of, float32 [B, T]."""
    begins = torch.ones_like(position_ids_BT, dtype=torch.bool)
    begins[:, 1:] = position_ids_BT[:, 1:] <= position_ids_BT[:, :-1]
    text_BT = begins.long().cumsum(1) - 1
    last = torch.zeros_like(position_ids_BT).scatter_reduce(1, text_BT, position_ids_BT, "amax")
    return last.gather(1, text_BT).float() + 1.0


_KINDS: dict[str, type[LlamaRotaryEmbedding]] = {
    "dynamic": DynamicRotaryEmbedding,
    "longrope": LongRotaryEmbedding,
}


def settle_rotary(language_model: nn.Module) -> None:
    """Gives a decoder whose scaling goes by length the tables of this module; others stay.

    Args:
        language_model: A causal language model of transformers, changed in place.
    """
    config: Any = language_model.config
    if config.model_type not in _LIKE_LLAMA:
        return
    kind = _KINDS.get(config.rope_parameters["rope_type"])
    decoder: Any = _compat.decoder_of(language_model)
    if kind is not None and not isinstance(decoder.rotary_emb, kind):
        decoder.rotary_emb = kind(config)
