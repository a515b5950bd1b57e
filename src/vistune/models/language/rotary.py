"""Dynamic rotary scaling that knows where a text begins: no text's angles depend on another's.

With dynamic scaling a text longer than `max_position_embeddings` turns by stretched frequencies.
Transformers stretches them for all rows of a batch by the longest, for every sample of a packed
row, and keeps them stretched for what comes later, unless that is short. Here each run of rising
positions is a text of its own, and each forward pass starts anew.

An answer that grows beyond the limit with a cache keeps the keys it has: each token's key is turned
by the frequencies of the length at which it was said, as in InternLM2's public code.

Source: InternLM2-chat-1.8B, config.json and remote code; transformers' "dynamic" rope type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vistune import _compat

# Decoders that turn whole heads, half against half, by one table.
_LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2", "qwen3"})


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
        angles = position_ids[..., None].float() * turns
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def _lengths(position_ids_BT: Tensor) -> Tensor:
    """Returns the length of the text that every position is of, float32 [B, T]."""
    begins = torch.ones_like(position_ids_BT, dtype=torch.bool)
    begins[:, 1:] = position_ids_BT[:, 1:] <= position_ids_BT[:, :-1]
    text_BT = begins.long().cumsum(1) - 1
    last = torch.zeros_like(position_ids_BT).scatter_reduce(1, text_BT, position_ids_BT, "amax")
    return last.gather(1, text_BT).float() + 1.0


def settle_rotary(language_model: nn.Module) -> None:
    """Gives a decoder with dynamic scaling the tables of this module; others are left alone.

    Args:
        language_model: A causal language model of transformers, changed in place.
    """
    config: Any = language_model.config
    if config.model_type not in _LIKE_LLAMA or config.rope_parameters["rope_type"] != "dynamic":
        return
    decoder: Any = _compat.decoder_of(language_model)
    if not isinstance(decoder.rotary_emb, DynamicRotaryEmbedding):
        decoder.rotary_emb = DynamicRotaryEmbedding(config)
