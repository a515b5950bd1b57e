"""CogVLM2's decoder: Llama-3 whose projections exist twice, for text and for image tokens.

Norms and attention are shared; the fused query-key-value projection, the attention output and the
SwiGLU are experts, chosen per token. Hidden states stand in the order of the route (language
tokens, then vision tokens), so an expert reads one contiguous slice and no token is computed
twice; only attention sees the order of the text.

Source: CogVLM (Wang et al., 2023), section 2.1; CogVLM2-Llama3-chat-19B, remote code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vistune import _compat
from vistune.models.cogvlm2.config import CogVLM2Config
from vistune.models.cogvlm2.rotary import StoredFrequencies, rotate
from vistune.models.cogvlm2.tokens import ExpertRoute


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What every layer of one forward pass shares.

    Args:
        shape: Batch and tokens of the text, (B, T).
        tables: Cosines and sines, see `rotary.rotary_tables`.
        mask: A packing mask, a mask as for torch's SDPA, or None for plain causal attention.
    """

    shape: tuple[int, int]
    tables: tuple[Tensor, Tensor]
    mask: Tensor | None


def run_experts(x_TD: Tensor, route: ExpertRoute, language: nn.Module, vision: nn.Module) -> Tensor:
    """Runs each expert over its slice.

    Args:
        x_TD: [T, D] in the route's order.
        route: Where the slices are.
        language: Expert of the first `route.num_language` rows.
        vision: Expert of the rest.

    Returns:
        [T, D'] in the route's order.
    """
    # While gradients are recorded an expert without tokens runs on zero rows: its weights then get
    # a zero gradient instead of none, which data parallelism would wait for.
    training = torch.is_grad_enabled()
    parts: list[Tensor] = []
    if route.num_language or training:
        parts.append(language(x_TD[: route.num_language]))
    if route.num_vision or training:
        parts.append(vision(x_TD[route.num_language :]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class SwiGLU(nn.Module):
    """Gated MLP without biases."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps [T, D] to [T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out


class ExpertMLP(nn.Module):
    """The SwiGLU of text tokens and the SwiGLU of image tokens."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        self.language_mlp = SwiGLU(config)
        self.vision_mlp = SwiGLU(config)

    def forward(self, x_TD: Tensor, route: ExpertRoute) -> Tensor:
        """Maps [T, D] to [T, D], both in the route's order."""
        return run_experts(x_TD, route, self.language_mlp, self.vision_mlp)


class ExpertAttention(nn.Module):
    """Joint causal attention; each token is projected by its own expert, before and after."""

    def __init__(self, config: CogVLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_multi_query_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.head_dim
        self.is_causal = True
        width = config.hidden_size
        fused = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.rotary_emb = StoredFrequencies(config)
        self.vision_expert_query_key_value = nn.Linear(width, fused, bias=True)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, fused, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_TD: Tensor,
        route: ExpertRoute,
        context: AttentionContext,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Maps [T, D] to [T, D], both in the route's order."""
        fused = run_experts(
            x_TD,
            route,
            self.language_expert_query_key_value,
            self.vision_expert_query_key_value,
        )
        heads = route.to_text(fused).view(*context.shape, -1, self.head_dim)
        sizes = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        query, key, value = torch.split(heads, sizes, dim=2)
        query = rotate(query, context.tables).transpose(1, 2)
        key, value = rotate(key, context.tables).transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = _compat.attention_named(self.config._attn_implementation)
        mixed, _ = attention(self, query, key, value, context.mask, scaling=self.head_dim**-0.5)
        rows_TD = route.to_route(mixed.reshape(route.num_tokens, -1))
        return run_experts(rows_TD, route, self.language_expert_dense, self.vision_expert_dense)


class DecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config: CogVLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = ExpertAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ExpertMLP(config)

    def forward(
        self,
        x_TD: Tensor,
        route: ExpertRoute,
        context: AttentionContext,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Maps [T, D] to [T, D], both in the route's order."""
        normed = self.input_layernorm(x_TD)
        x_TD = x_TD + self.self_attn(normed, route, context, past_key_values=past_key_values)
        out: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD), route)
        return out
