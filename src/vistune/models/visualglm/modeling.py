"""VisualGLM: EVA ViT, Q-Former and linear layer in front of a ChatGLM decoder.

The ViT and the Q-Former are transformers' BLIP-2 modules; the decoder is ours. An image becomes a
fixed number of tokens that stand inside the prompt, so all of its tokens look at all of the
prompt. The text around it is built in `vistune.models.visualglm.prompt`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vistune.errors import ModelError
from vistune.models.chatglm.modeling import ChatGLMForCausalLM, ChatGLMGenerationMixin
from vistune.models.chatglm.positions import padded_positions
from vistune.models.contract import ModuleMap
from vistune.models.splice import idle, splice
from vistune.models.visualglm.configuration import VisualGLMConfig, vision_grid
from vistune.types import VisionGrid


class VisualGLMConnector(nn.Module):
    """Q-Former and linear layer: a fixed number of queries read the ViT's output.

    Args:
        config: The model's settings.
    """

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def queries(self, features_NPC: Tensor) -> Tensor:
        """Returns the Q-Former's output, [N, K, width], from all of the ViT's positions."""
        query_tokens = self.query_tokens.expand(features_NPC.shape[0], -1, -1)
        out = self.qformer(query_embeds=query_tokens, encoder_hidden_states=features_NPC)
        states: Tensor = out.last_hidden_state
        return states

    def forward(self, features_NPC: Tensor) -> Tensor:
        """Returns the image embeddings, [N, K, D]."""
        states = self.queries(features_NPC)
        out: Tensor = self.projection(states)
        return out


class VisualGLMForConditionalGeneration(PreTrainedModel, ChatGLMGenerationMixin):  # type: ignore[misc]
    """The whole model. See the module for what it is made of.

    Source: VisualGLM-6B; input construction in `vistune.models.visualglm.prompt`.
    """

    config_class = VisualGLMConfig
    config: VisualGLMConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMLayer", "Blip2EncoderLayer", "Blip2QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__(config)
        self.touch_vision_always = False
        self.vision_tower = Blip2VisionModel(config.vision_config)
        # transformers gives the closing norm the blocks' epsilon; the public model has its own.
        self.vision_tower.post_layernorm.eps = config.vision_norm_eps
        self.connector = VisualGLMConnector(config)
        self.language_model = ChatGLMForCausalLM(config.text_config)
        self.post_init()

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules."""
        return ModuleMap(
            vision=("vision_tower",),
            connector=("connector",),
            language=("language_model",),
            head=("language_model.lm_head",),
        )

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no gradient reaches: none."""
        return frozenset()

    @property
    def grid(self) -> VisionGrid:
        """One input size, and as many tokens as the Q-Former has queries."""
        return vision_grid(self.config)

    @property
    def image_token_id(self) -> int:
        """The id that stands where image embeddings go."""
        token_id = self.config.image_token_id
        assert token_id is not None
        return token_id

    def get_input_embeddings(self) -> nn.Module:
        """Returns the decoder's embedding."""
        return self.language_model.model.embed_tokens

    def image_embeddings(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Returns what images become in the decoder: [N, K, D].

        Args:
            pixel_values_NCYX: float [N, 3, Y, X], normalised with CLIP's mean and deviation.
        """
        features = self.vision_tower(pixel_values_NCYX).last_hidden_state
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.connector.query_tokens.dtype)
        out: Tensor = self.connector(features)
        return out

    def embeddings(
        self,
        input_ids_BT: Tensor,
        pixel_values_NCYX: Tensor | None,
        *,
        pre_image_length: int | None = None,
    ) -> Tensor:
        """Embeds text and puts the images in their places.

        Args:
            input_ids_BT: int64 [B, T].
            pixel_values_NCYX: Images in reading order, or None.
            pre_image_length: Where the image starts in every row, as the public model is told;
                None where `image_token_id` marks the places.

        Returns:
            [B, T, D].

        Raises:
            ModelError: Image tokens and images do not match in number.
        """
        if pre_image_length is None:
            at_image_BT = input_ids_BT == self.image_token_id
        else:
            at_image_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
            if pixel_values_NCYX is not None:
                end = pre_image_length + self.config.num_query_tokens
                at_image_BT[:, pre_image_length:end] = True
        text_BTD = self.get_input_embeddings()(input_ids_BT.masked_fill(at_image_BT, 0))
        if pixel_values_NCYX is None:
            images = None
        else:
            images = self.image_embeddings(pixel_values_NCYX).flatten(0, 1)
        return splice(text_BTD, at_image_BT, images)

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
    ) -> Tensor:
        """Runs one packed row; see `vistune.models.contract.VisionLanguageModel`.

        `position_ids_BT` and `max_seqlen` are not used: ChatGLM's positions come from its ids.

        Returns:
            [1, T, D].

        Raises:
            ModelError: A sample lacks `<sop>` or its mask token, or images do not match in number.
        """
        embeds_BTD = self.embeddings(input_ids_BT, pixel_values_NCYX)
        if pixel_values_NCYX is None:
            embeds_BTD = embeds_BTD + idle(
                self.image_embeddings,
                (self.vision_tower, self.connector),
                side_px=self.config.vision_config.image_size,
                like=embeds_BTD,
                always=self.touch_vision_always,
            )
        return self.language_model.model.packed(embeds_BTD, input_ids_BT, cu_seqlens)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the head: [M, D] -> [M, V]."""
        out: Tensor = self.language_model.lm_head(hidden_MD)
        return out

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        pre_image_length: int | None = None,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch, with or without a cache.

        Args:
            input_ids: int64 [B, T].
            pixel_values: [N, 3, Y, X], or None.
            attention_mask: [B, past + T], 0 at padding, or None.
            position_ids: int64 [B, 2, T], or None to read them from the ids.
            past_key_values: The cache.
            inputs_embeds: [B, T, D] in place of ids and images.
            labels: int64 [B, T], -100 where no loss is wanted; shifted here.
            use_cache: Return a cache.
            logits_to_keep: Logits of that many last tokens only; 0 for all.
            pre_image_length: See `embeddings`.

        Raises:
            ModelError: Neither ids nor embeddings, or images do not match in number.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ModelError("VisualGLM needs input_ids or inputs_embeds")
            if position_ids is None and past_key_values is None:
                position_ids = padded_positions(input_ids, attention_mask, self.config.text_config)
            inputs_embeds = self.embeddings(
                input_ids, pixel_values, pre_image_length=pre_image_length
            )
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        assert isinstance(outputs, CausalLMOutputWithPast)
        return outputs

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds the positions, and the image in the first step only."""
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("pre_image_length", None)
        return inputs
