"""CogVLM2 as a transformers model: generation with a cache, training on packed rows.

The attribute names are those of the public state dict, so the model's own is that layout, tensor
for tensor, and adapters trained on the public code find their modules. The loss is not computed
here: training asks for `hidden_states` and `logits`.

Source: CogVLM2-Llama3-chat-19B, config.json and remote code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import packing_mask, register_packed_attention
from vistune.models.cogvlm2.config import CONNECTOR_STRIDE, NUM_IMAGE_MARKS, CogVLM2Config
from vistune.models.cogvlm2.decoder import AttentionContext, DecoderLayer
from vistune.models.cogvlm2.rotary import StoredFrequencies, inverse_frequencies, rotary_tables
from vistune.models.cogvlm2.tokens import ExpertRoute, position_ids, vision_expert_mask
from vistune.models.cogvlm2.vision import PatchEmbedding, VisionPath
from vistune.models.contract import ModuleMap
from vistune.models.splice import idle
from vistune.types import ImageDefaults, VisionGrid

MODULE_MAP = ModuleMap(
    vision=("model.vision.patch_embedding", "model.vision.transformer"),
    connector=(
        "model.vision.conv",
        "model.vision.linear_proj",
        "model.vision.boi",
        "model.vision.eoi",
    ),
    language=("model.embed_tokens", "model.layers", "model.norm"),
    head=("lm_head",),
)
"""Roles by the public names; visual experts belong to the language model."""


def vision_grid(config: CogVLM2Config) -> VisionGrid:
    """Returns image tokens as a function of pixels: 2306 for an image of 1344 x 1344."""
    vision = config.vision_config
    return VisionGrid(
        patch_px=vision.patch_size,
        num_extra_tokens=NUM_IMAGE_MARKS,
        downsample=CONNECTOR_STRIDE,
        fixed_size_px=vision.image_size,
    )


def image_defaults(config: CogVLM2Config) -> ImageDefaults:
    """Returns the public preprocessing: stretched to a square, CLIP's mean and deviation."""
    return ImageDefaults(
        size_px=config.vision_config.image_size,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample="bicubic",
        mode="resize",
    )


class CogVLM2PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers needs to know of every class here."""

    config_class = CogVLM2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, PatchEmbedding):
            init.normal_(module.cls_embedding, std=std)
        elif isinstance(module, VisionPath):
            init.normal_(module.boi, std=std)
            init.normal_(module.eoi, std=std)
        elif isinstance(module, StoredFrequencies):
            init.copy_(module.inv_freq, inverse_frequencies(self.config))


class CogVLM2Model(CogVLM2PreTrainedModel):
    """Tower, connector and decoder up to the final norm.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vision = VisionPath(config)
        # Whatever was asked for: any other attention would mix packed samples.
        config._attn_implementation = register_packed_attention()
        self.post_init()

    def image_features(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Images to decoder vectors, begin and end marks included.

        Args:
            pixel_values_NCYX: Preprocessed images [N, 3, Y, X].

        Returns:
            [N, K, D].

        Raises:
            ModelError: The images do not have the one size the tower knows.
        """
        side = self.config.vision_config.image_size
        shape = tuple(pixel_values_NCYX.shape)
        if len(shape) != 4 or shape[-2:] != (side, side):
            raise ModelError(
                "the tower takes images of one size",
                where="pixel_values",
                got=list(shape),
                expected=f"[images, {self.config.vision_config.in_channels}, {side}, {side}]",
            )
        features: Tensor = self.vision(pixel_values_NCYX)
        return features

    def embed(
        self, input_ids_BT: Tensor, is_image_BT: Tensor, pixel_values: Tensor | None
    ) -> Tensor:
        """Text embeddings with image vectors at the image slots; their ids are not looked up.

        Args:
            input_ids_BT: int64 [B, T].
            is_image_BT: bool [B, T]; as many slots as `pixel_values` makes vectors.
            pixel_values: Images [N, 3, Y, X] in reading order, or None.

        Returns:
            [B * T, D] in the order of the text.
        """
        text_TD = self.embed_tokens(input_ids_BT.masked_fill(is_image_BT, 0)).flatten(0, 1)
        if pixel_values is None:
            embedded: Tensor = text_TD
            return embedded
        features_KD = self.image_features(pixel_values).flatten(0, 1).to(text_TD.dtype)
        flat = is_image_BT.flatten()
        rank_T = flat.long().cumsum(dim=0) - 1
        own_T = torch.arange(flat.shape[0], device=flat.device)
        index_T = torch.where(flat, rank_T + flat.shape[0], own_T)
        return torch.cat([text_TD, features_KD]).index_select(0, index_T)

    def decode(
        self,
        embedded_TD: Tensor,
        *,
        route: ExpertRoute,
        position_ids_BT: Tensor,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Runs the decoder.

        Args:
            embedded_TD: [B * T, D] in the order of the text.
            route: Which expert computes which token.
            position_ids_BT: int64 [B, T].
            mask: See `AttentionContext`.
            past_key_values: Keys and values of earlier tokens, appended to.

        Returns:
            [B, T, D], after the final norm.
        """
        batch, num_tokens = position_ids_BT.shape
        stored = self.get_buffer("layers.0.self_attn.rotary_emb.inv_freq")
        context = AttentionContext(
            shape=(batch, num_tokens),
            tables=rotary_tables(
                position_ids_BT, stored, config=self.config, dtype=embedded_TD.dtype
            ),
            mask=mask,
        )
        x_TD = route.to_route(embedded_TD)
        for layer in self.layers:
            x_TD = layer(x_TD, route, context, past_key_values=past_key_values)
        return route.to_text(self.norm(x_TD)).view(batch, num_tokens, -1)


class CogVLM2ForConditionalGeneration(CogVLM2PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model: a `VisionLanguageModel` for training, a transformers model for the rest.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__(config)
        self.model = CogVLM2Model(config)
        # Set where tower and connector are sharded: then every rank must run them in every row.
        self.touch_vision_always = False
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules."""
        return MODULE_MAP

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no output depends on: none."""
        return frozenset()

    @property
    def grid(self) -> VisionGrid:
        """Image tokens as a function of pixels."""
        return vision_grid(self.config)

    @property
    def image_token_id(self) -> int:
        """The id written at every image slot, marks included."""
        return int(self.config.image_token_id)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding table."""
        return self.model.embed_tokens

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
    ) -> Tensor:
        """Runs one packed row up to and including the final norm; see `VisionLanguageModel`.

        Args:
            input_ids_BT: int64 [1, T].
            position_ids_BT: Not used: positions follow from the image slots and `cu_seqlens`.
            cu_seqlens: int32 [S + 1].
            max_seqlen: Tokens of the longest sample.
            pixel_values_NCYX: Images in reading order, or None.

        Returns:
            [1, T, D].

        Raises:
            ModelError: Image slots and images do not fit. (Off the CPU a failed device assertion,
                which nothing has to wait for.)
        """
        is_image_BT = self._image_slots(input_ids_BT)
        _check_slots(
            is_image_BT, pixel_values_NCYX, self.config, wait=input_ids_BT.device.type == "cpu"
        )
        positions_BT = position_ids(
            is_image_BT, num_image_tokens=self.config.num_image_tokens, cu_seqlens=cu_seqlens
        )
        embedded_TD = self.model.embed(input_ids_BT, is_image_BT, pixel_values_NCYX)
        if pixel_values_NCYX is None:
            vision = self.model.vision
            embedded_TD = embedded_TD + idle(
                vision,
                (vision,),
                # The smallest picture the tower and the connector's fold can see.
                side_px=CONNECTOR_STRIDE * self.config.vision_config.patch_size,
                like=embedded_TD,
                always=self.touch_vision_always,
            )
        return self.model.decode(
            embedded_TD,
            route=self._route(is_image_BT, pixel_values_NCYX),
            position_ids_BT=positions_BT,
            mask=packing_mask(cu_seqlens, max_seqlen),
        )

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the output head: [M, D] -> [M, V]."""
        scores: Tensor = self.lm_head(hidden_MD)
        return scores

    def prompt_positions(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
        """Positions of a prompt; each token said after it takes the last one plus one.

        Args:
            input_ids_BT: int64 [B, T].
            attention_mask_BT: [B, T], 0 at padding on either side; None without padding.

        Returns:
            int64 [B, T], for `forward`.
        """
        is_image_BT = self._image_slots(input_ids_BT, mask=attention_mask_BT)
        return self._positions(is_image_BT, attention_mask_BT, num_past=0)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch, or the next tokens of one.

        Args:
            input_ids: int64 [B, T].
            pixel_values: Images [N, 3, Y, X] in reading order, or None.
            attention_mask: [B, T with the cached tokens], 0 at padding. Needed wherever there is
                padding: the public pad token is also the image token.
            position_ids: int64 [B, T]; made from the image slots where None.
            token_type_ids: [B, T], 1 at image slots; made from `image_token_id` where None.
            past_key_values: Keys and values of earlier tokens.
            use_cache: Whether to keep keys and values for the next tokens.
            logits_to_keep: Scores of the last so many positions, 0 for all; or which positions.
            return_dict: Only True is supported.

        Returns:
            `logits` [B, T', V], `hidden_states` (the last only, [B, T, D]) and `past_key_values`.

        Raises:
            ModelError: Image slots and images do not fit.
        """
        if not return_dict:
            raise ModelError("outputs are returned by name only", where="return_dict")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if num_past and pixel_values is None:
            # What follows a prompt is text, whatever token was said.
            is_image = torch.zeros_like(input_ids, dtype=torch.bool)
        else:
            now_mask = None if attention_mask is None else attention_mask[:, num_past:]
            is_image = self._image_slots(input_ids, token_type_ids, now_mask)
            _check_slots(is_image, pixel_values, self.config, wait=True)
        if position_ids is None:
            position_ids = self._positions(is_image, attention_mask, num_past=num_past)
        embedded = self.model.embed(input_ids, is_image, pixel_values)
        hidden = self.model.decode(
            embedded,
            route=self._route(is_image, pixel_values),
            position_ids_BT=position_ids,
            mask=self._causal_mask(
                embedded.view(*input_ids.shape, -1), attention_mask, past_key_values
            ),
            past_key_values=past_key_values,
        )
        return CausalLMOutputWithPast(
            logits=self.logits(_kept(hidden, logits_to_keep)),
            hidden_states=(hidden,),
            past_key_values=past_key_values if use_cache else None,
        )

    def _causal_mask(
        self, embedded_BTD: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> Tensor | None:
        made: Tensor | None = create_causal_mask(
            config=self.config,
            inputs_embeds=embedded_BTD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=None,  # shared positions would be read as the seams of packed samples
        )
        return made

    def _image_slots(
        self, input_ids_BT: Tensor, token_types: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if token_types is not None:
            slots_BT = token_types == 1
        else:
            slots_BT = input_ids_BT == self.image_token_id
        return slots_BT if mask is None else slots_BT & mask.bool()

    def _route(self, is_image_BT: Tensor, pixel_values: Tensor | None) -> ExpertRoute:
        if pixel_values is None:
            return ExpertRoute.text(is_image_BT.numel())
        num_image_tokens = self.config.num_image_tokens
        is_vision_BT = vision_expert_mask(is_image_BT, num_image_tokens=num_image_tokens)
        num_vision = int(pixel_values.shape[0]) * (num_image_tokens - 1)
        return ExpertRoute.of(is_vision_BT.flatten(), num_vision=num_vision)

    def _positions(self, is_image: Tensor, mask: Tensor | None, *, num_past: int) -> Tensor:
        if num_past:
            raise ModelError(
                "positions after cached tokens cannot be made from the new tokens alone",
                where="position_ids",
                fix="pass position_ids: the last position plus one, and so on",
            )
        return position_ids(
            is_image, num_image_tokens=self.config.num_image_tokens, attention_mask_BT=mask
        )

    # The hooks of GenerationMixin, checked with transformers 5.17 and 5.23.

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        # By default the mask is guessed from pad tokens, which here stand at the image slots too.
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask = model_kwargs.get("attention_mask")
        is_image = self._image_slots(inputs_tensor, model_kwargs.get("token_type_ids"), mask)
        # Kept beside the ids, because a generated image token must not be taken for an image.
        model_kwargs["token_type_ids"] = is_image.long()
        return self._positions(is_image, mask, num_past=0)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        num_new = int(kwargs.get("num_new_tokens", 1))
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)
        updated["token_type_ids"][:, -num_new:] = 0
        return updated


def _kept(hidden_BTD: Tensor, positions: int | Tensor) -> Tensor:
    if isinstance(positions, Tensor):
        return hidden_BTD[:, positions]
    return hidden_BTD[:, -positions:] if positions else hidden_BTD


def _check_slots(
    is_image_BT: Tensor, pixel_values: Tensor | None, config: CogVLM2Config, *, wait: bool
) -> None:
    """Proves that there are as many image slots as images fill."""
    num_images = 0 if pixel_values is None else int(pixel_values.shape[0])
    expected = num_images * config.num_image_tokens
    if not wait:
        _compat.assert_on_device(
            is_image_BT.sum() == expected, f"{num_images} images need {expected} image tokens"
        )
        return
    found = int(is_image_BT.sum())
    if found != expected:
        raise ModelError(
            "image tokens and images do not fit",
            where="input_ids",
            got=f"{found} image tokens (id {config.image_token_id}) and {num_images} images",
            expected=f"{config.num_image_tokens} tokens for each image",
            fix="pass pixel_values for every image, and attention_mask where there is padding",
        )
