"""MGM (Mini-Gemini) on Gemma: two towers, patch-info mining, images among the text.

The model takes one picture per image, the high-resolution one; the low-resolution pictures are
made from it here, as MGM makes them. CLIP and Gemma are transformers'; the ConvNeXt and the mining
are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import packing_mask, register_packed_attention
from vistune.models.contract import ModuleMap
from vistune.models.fused.trunk import FusedTrunk
from vistune.models.mgm.configuration import MGMConfig, vision_grid
from vistune.models.mgm.convnext import ConvNeXtStages, joined_map
from vistune.models.mgm.mining import MGMConnector, tiles
from vistune.models.splice import idle, splice
from vistune.types import Tail, VisionGrid

_HIGH_RES_STEP_PX = 32


class MGMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model. See the module for what it is made of.

    Source: MGM-2B and MGM-2B-HD. One thing differs unless `aux_drop_path_rate` says so: MGM's
    recipe leaves stochastic depth on in the frozen high-resolution tower.
    """

    config_class = MGMConfig
    config: MGMConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["GemmaDecoderLayer", "CLIPEncoderLayer", "ConvNeXtBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        _check_sizes(config)
        assert config.aux_widths is not None
        assert config.aux_depths is not None
        self.touch_vision_always = False
        self.fused: FusedTrunk | None = None
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.vision_tower_aux = ConvNeXtStages(
            config.aux_widths, config.aux_depths, drop_path_rate=config.aux_drop_path_rate
        )
        self.connector = MGMConnector(
            config.vision_config.hidden_size,
            sum(config.aux_widths),
            config.text_config.hidden_size,
            kind=config.connector,
        )
        self.language_model = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=register_packed_attention()
        )
        if config.gemma_erf_gelu:
            for layer in self.language_model.model.layers:
                layer.mlp.act_fn = nn.GELU()
        self.post_init()

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules; the head is tied to the embedding and belongs to the language model."""
        return ModuleMap(
            vision=("vision_tower", "vision_tower_aux"),
            connector=("connector",),
            language=("language_model",),
        )

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no gradient reaches: CLIP behind the selected layer."""
        num_layers = self.config.vision_config.num_hidden_layers
        num_used = range(num_layers + 1)[self.config.vision_select_layer]
        unused = (
            "vision_tower.post_layernorm.",
            *(f"vision_tower.encoder.layers.{layer}." for layer in range(num_used, num_layers)),
        )
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(unused))

    @property
    def grid(self) -> VisionGrid:
        """Tokens of a picture of `image_size_aux`, the one size the model takes."""
        return vision_grid(self.config)

    @property
    def image_token_id(self) -> int:
        """The id that stands where image embeddings go."""
        token_id = self.config.image_token_id
        assert token_id is not None
        return token_id

    def get_input_embeddings(self) -> nn.Module:
        """Returns Gemma's embedding, which multiplies what it looks up."""
        found = self.language_model.get_input_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head."""
        found = self.language_model.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def low_resolution(self, pixels_NCYX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Makes the pictures for CLIP from the normalised high-resolution ones.

        Bilinear, without antialiasing, on the normalised values: a resized photograph is not the
        same.

        Args:
            pixels_NCYX: float [N, 3, Y, X].

        Returns:
            crops: [N, crops, 3, s, s], crops in reading order.
            whole: [N, 3, s, s], or None when the whole picture is not taken besides its crops.
        """
        grid, side = self.config.image_grid, self.config.vision_config.image_size
        low = _resized(pixels_NCYX.float(), self.config.num_low_px)
        crops = tiles(low, count=grid)
        return crops, _resized(low, side) if self.config.takes_global else None

    def low_features(self, pictures_NCYX: Tensor) -> Tensor:
        """Returns CLIP's features of the selected layer without the class token, [N, P, C]."""
        pictures_NCYX = _as_weights(pictures_NCYX, self.vision_tower)
        out = self.vision_tower(pictures_NCYX, output_hidden_states=True)
        features: Tensor = out.hidden_states[self.config.vision_select_layer][:, 1:]
        return features

    def high_features(self, pixels_NCYX: Tensor) -> Tensor:
        """Returns the ConvNeXt's joined map, [N, C, Y, X]."""
        stages: list[Tensor] = self.vision_tower_aux(
            _as_weights(pixels_NCYX, self.vision_tower_aux)
        )
        return joined_map(stages)

    def paired_features(self, pixels_NCYX: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns what the mining compares.

        Args:
            pixels_NCYX: float [N, 3, Y, X], normalised.

        Returns:
            low: [N, pictures, P, C]; the whole picture first where it is taken, then the crops.
            maps: [N x crops, C, Y, X]; each crop's part of the high-resolution map.
            whole_maps: [N, C, Y', X'], the map scaled down by the grid; None without the whole.
        """
        grid = self.config.image_grid
        crops, whole = self.low_resolution(pixels_NCYX)
        num_images, num_crops = crops.shape[:2]
        features = self.low_features(crops.flatten(0, 1))
        low = features.reshape(num_images, num_crops, *features.shape[1:])
        maps = self.high_features(pixels_NCYX)
        parts = tiles(maps, count=grid).flatten(0, 1)
        if whole is None:
            return low, parts, None
        low = torch.cat((self.low_features(whole)[:, None], low), dim=1)
        return low, parts, _resized(maps.float(), maps.shape[-1] // grid).to(maps.dtype)

    def image_embeddings(self, pixels_NCYX: Tensor) -> Tensor:
        """Returns what images become before Gemma's embedding factor: [N, K, D].

        Args:
            pixels_NCYX: float [N, 3, S, S], S = `image_size_aux`, normalised with CLIP's mean and
                deviation.

        Raises:
            ModelError: The pictures have another size.
        """
        expected = self.config.image_size_aux
        if tuple(pixels_NCYX.shape[-2:]) != (expected, expected):
            raise ModelError(
                "MGM takes pictures of one size",
                got=f"{pixels_NCYX.shape[-2]} x {pixels_NCYX.shape[-1]} pixels",
                expected=f"{expected} x {expected}",
                fix="use the image plan that belongs to the model",
            )
        low, maps, whole_maps = self.paired_features(pixels_NCYX)
        low = _as_weights(low, self.connector)
        num_crops = self.config.num_crops
        crops: Tensor = self.connector(
            low[:, -num_crops:].flatten(0, 1), _as_weights(maps, self.connector)
        )
        crops = crops.reshape(low.shape[0], -1, crops.shape[-1])
        if whole_maps is None:
            return crops
        whole = self.connector(low[:, 0], _as_weights(whole_maps, self.connector))
        return torch.cat((whole, crops), dim=1)

    def embeddings(self, input_ids_BT: Tensor, pixels_NCYX: Tensor | None) -> Tensor:
        """Embeds text and puts the images in their places, all multiplied by Gemma's factor.

        Args:
            input_ids_BT: int64 [B, T]; an image stands as a run of `image_token_id`.
            pixels_NCYX: Images in reading order, or None.

        Returns:
            [B, T, D].

        Raises:
            ModelError: Image tokens and images do not match in number.
        """
        at_image_BT = input_ids_BT == self.image_token_id
        table = self.get_input_embeddings()
        text_BTD = table(input_ids_BT.masked_fill(at_image_BT, 0))
        if pixels_NCYX is None:
            return splice(text_BTD, at_image_BT, None)
        images_NKD = self.image_embeddings(pixels_NCYX).to(text_BTD.dtype)
        # The factor is rounded to the embeddings' number format first, as Gemma's own is.
        factor = torch.tensor(
            _compat.embedding_scale(table), dtype=text_BTD.dtype, device=text_BTD.device
        )
        return splice(text_BTD, at_image_BT, (images_NKD * factor).flatten(0, 1))

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

        Returns:
            [1, T, D].

        Raises:
            ModelError: Image tokens and images do not match in number.
        """
        embeds_BTD = self._row_embeddings(input_ids_BT, pixel_values_NCYX)
        if self.fused is not None:
            return self.fused.hidden_states(
                embeds_BTD, position_ids_BT, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
        out = _compat.decoder_of(self.language_model)(
            inputs_embeds=embeds_BTD,
            attention_mask=packing_mask(cu_seqlens, max_seqlen),
            position_ids=position_ids_BT,
            use_cache=False,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def target_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
        tail: Tail,
    ) -> Tensor:
        """As `hidden_states`, at the target positions only: [M, D]. Needs the fused layers."""
        assert self.fused is not None
        return self.fused.target_states(
            self._row_embeddings(input_ids_BT, pixel_values_NCYX),
            position_ids_BT,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            tail=tail,
        )

    def _row_embeddings(self, input_ids_BT: Tensor, pixel_values_NCYX: Tensor | None) -> Tensor:
        """Returns `embeddings` that depend on every trained vision and connector weight."""
        embeds_BTD = self.embeddings(input_ids_BT, pixel_values_NCYX)
        if pixel_values_NCYX is not None:
            return embeds_BTD
        seeing = (self.vision_tower, self.vision_tower_aux, self.connector)
        return embeds_BTD + idle(
            self.image_embeddings,
            seeing,
            side_px=self.config.image_size_aux,
            like=embeds_BTD,
            always=self.touch_vision_always,
        )

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the tied head: [M, D] -> [M, V]."""
        out: Tensor = self.language_model.lm_head(hidden_MD)
        return out

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch, with or without a cache. The loss is computed outside.

        Args:
            input_ids: int64 [B, T], image tokens expanded.
            pixel_values: Images in reading order, [N, 3, S, S].
            attention_mask: [B, past + T], 0 at padding, or None.
            position_ids: int64 [B, T].
            past_key_values: The cache.
            inputs_embeds: [B, T, D] in place of ids and images, already multiplied.
            use_cache: Return a cache.
            logits_to_keep: Logits of that many last tokens only; 0 for all.
            kwargs: For Gemma.

        Raises:
            ModelError: Neither or both of ids and embeddings, labels, or a number of images that
                does not fit the text.
        """
        if kwargs.pop("labels", None) is not None:
            raise ModelError("labels never enter the model; compute the loss from the logits")
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embeddings(input_ids, pixel_values)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        assert isinstance(out, CausalLMOutputWithPast)
        return out

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Gives images to the first pass only; afterwards the cache holds them."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = kwargs.get("past_key_values")
        if pixel_values is not None and (cache is None or cache.get_seq_length() == 0):
            inputs["pixel_values"] = pixel_values
        return inputs


def _resized(pictures_NCYX: Tensor, side: int) -> Tensor:
    return F.interpolate(pictures_NCYX, size=(side, side), mode="bilinear", align_corners=False)


def _as_weights(states: Tensor, module: nn.Module) -> Tensor:
    """Casts to a module's number format, unless autocast does it."""
    first = next(module.parameters())
    if torch.is_autocast_enabled(states.device.type):
        return states
    return states.to(first.dtype)


def _check_sizes(config: MGMConfig) -> None:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size * config.image_grid
    size = config.image_size_aux
    if size % _HIGH_RES_STEP_PX or (size // 4) % side:
        raise ModelError(
            "the high-resolution map cannot be cut into one window per patch",
            where="image_size_aux",
            got=f"{size} pixels for {side} x {side} patches",
            expected=f"a multiple of {_HIGH_RES_STEP_PX} and of {4 * side}",
        )
