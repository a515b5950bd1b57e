"""The ChatGLM-6B decoder: prefix-LM, two-dimensional rotary positions, alpha-scaled residuals.

An implementation of our own on transformers' base classes, so that it generates, saves,
checkpoints activations and takes adapters as any other model. Queries, keys and values have a
linear layer each; the public layouts, which fuse them in different orders, are split on loading
(`vistune.models.visualglm.keys`). Images are not known here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vistune.errors import ModelError
from vistune.models.chatglm.attention import (
    PackedPrefixes,
    masked_attention,
    packed_attention,
    prefix_mask,
    rotary_tables,
    rotate,
)
from vistune.models.chatglm.configuration import ChatGLMConfig
from vistune.models.chatglm.positions import packed_positions, padded_positions
from vistune.types import IGNORE_INDEX


class ChatGLMAttention(nn.Module):
    """Multi-head attention with two-dimensional rotary positions.

    Args:
        config: The decoder's settings.
        layer_idx: Place of the layer, the cache's key.
    """

    def __init__(self, config: ChatGLMConfig, *, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | PackedPrefixes,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Returns [B, T, D]; `mask` says who may look at whom."""
        by_head = (*hidden_BTD.shape[:2], -1, self.head_dim)
        query, key, value = (
            layer(hidden_BTD).view(by_head).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, tables), rotate(key, tables)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if isinstance(mask, PackedPrefixes):
            mixed = packed_attention(query, key, value, mask)
        else:
            mixed = masked_attention(query, key, value, mask)
        out: Tensor = self.dense(mixed.transpose(1, 2).flatten(2))
        return out


class ChatGLMMLP(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        inner = F.gelu(self.dense_h_to_4h(hidden_BTD), approximate="tanh")
        out: Tensor = self.dense_4h_to_h(inner)
        return out


class ChatGLMLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One decoder layer. The residual carries the normalised input, scaled, not the input."""

    def __init__(self, config: ChatGLMConfig, *, layer_idx: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLMAttention(config, layer_idx=layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | PackedPrefixes,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Returns [B, T, D]."""
        normed = self.input_layernorm(hidden_BTD)
        attended = self.attention(normed, tables=tables, mask=mask, past_key_values=past_key_values)
        normed = self.post_attention_layernorm(normed * self.residual_scale + attended)
        out: Tensor = normed * self.residual_scale + self.mlp(normed)
        return out


class ChatGLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers must know of ChatGLM modules to save, initialise and shard them."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ChatGLMLayer(config, layer_idx=index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Runs a padded batch, with or without a cache.

        Args:
            input_ids: int64 [B, T]; needed unless `inputs_embeds` and `position_ids` are given.
            attention_mask: [B, past + T], 0 at padding, or None.
            position_ids: int64 [B, 2, T]; read from `input_ids` where None.
            past_key_values: The cache, updated in place.
            inputs_embeds: [B, T, D] in place of the embedded ids.
            use_cache: Return a cache.

        Raises:
            ModelError: No positions can be read, or part of a prompt meets a filled cache.
        """
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if input_ids is None or num_past:
                raise ModelError(
                    "ChatGLM's positions depend on the whole sequence of token ids",
                    expected="input_ids of the whole sequence, or position_ids [B, 2, T]",
                )
            position_ids = padded_positions(input_ids, attention_mask, self.config)
        if num_past and bool((position_ids[:, 1] == 0).any()):
            raise ModelError(
                "part of a prompt reached ChatGLM after the cache was filled: every prompt token "
                "looks at the whole prompt, so it must be given at once",
                fix="pass the whole prompt in one call",
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        caching = self.config.use_cache if use_cache is None else use_cache
        if caching and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        mask = prefix_mask(position_ids, attention_mask, num_past=num_past)
        hidden = self._layers(inputs_embeds, position_ids, mask, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values if caching else None
        )

    def packed(self, inputs_embeds_BTD: Tensor, input_ids_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Runs a packed row; no sample looks at another.

        Args:
            inputs_embeds_BTD: [1, T, D].
            input_ids_BT: int64 [1, T]; only the special ids matter.
            cu_seqlens: int32 [S + 1].

        Returns:
            [1, T, D], after the final norm.

        Raises:
            ModelError: A sample lacks `<sop>` or its mask token.
        """
        positions, prompt_lengths = packed_positions(input_ids_BT, cu_seqlens, self.config)
        prefixes = PackedPrefixes.of(positions, prompt_lengths, cu_seqlens)
        return self._layers(inputs_embeds_BTD, positions, prefixes, None)

    def _layers(
        self,
        hidden_BTD: Tensor,
        positions_B2T: Tensor,
        mask: Tensor | PackedPrefixes,
        past_key_values: Cache | None,
    ) -> Tensor:
        tables = rotary_tables(positions_B2T, self.config)
        for layer in self.layers:
            hidden_BTD = layer(
                hidden_BTD, tables=tables, mask=mask, past_key_values=past_key_values
            )
        out: Tensor = self.norm(hidden_BTD)
        return out


class ChatGLMGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """Generation of models whose positions only the whole sequence of ids tells.

    By the last word of this name transformers knows a model that generates (5.17 and 5.23).
    """

    config: Any

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds the positions."""
        kwargs["position_ids"] = padded_positions(
            input_ids, attention_mask, self.config.get_text_config()
        )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        return inputs


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
    """ChatGLM with its head (untied, without bias)."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.model = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch; see `ChatGLMModel.forward` for the shared arguments.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], 0 at padding, or None.
            position_ids: int64 [B, 2, T], or None.
            past_key_values: The cache.
            inputs_embeds: [B, T, D] in place of the embedded ids.
            labels: int64 [B, T], -100 where no loss is wanted; shifted here.
            use_cache: Return a cache.
            logits_to_keep: Logits of that many last tokens only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None if labels is None else shifted_cross_entropy(logits, labels)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )


def shifted_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Returns the mean cross-entropy in fp32 of each position's prediction of the next label."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        labels_BT[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
    )
