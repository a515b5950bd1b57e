"""The composed model: vision tower, connector, language model, with image features spliced in.

It is single-device model code. It computes no loss, moves nothing to a device and knows no
optimizer. Training uses `hidden_states` and `logits`; `forward` is what generation and the rest of
the transformers world expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.anyres import Tiles, new_tiles
from vistune.models.attention import packing_mask, register_packed_attention
from vistune.models.connectors import build_connector
from vistune.models.contract import ModuleMap
from vistune.models.facts import vision_config_from
from vistune.models.fused.trunk import FusedTrunk
from vistune.models.language.decoder import check_config, logits_of
from vistune.models.splice import image_places
from vistune.models.towers.families import (
    TowerPlan,
    features_width,
    pixel_shuffle,
    to_state,
    tower_features,
    tower_grid,
)
from vistune.models.towers.load import build_tower
from vistune.recipe import TilesConfig
from vistune.types import ImageShape, Tail, VisionGrid


class ComposedConfig(PreTrainedConfig):  # type: ignore[misc]
    """Everything needed to build a composed model.

    Args:
        vision_config: Config (or its values) of the part of the encoder that is used.
        text_config: Config (or its values) of the language model.
        tower: The tower's plan, as values.
        connector_kind: `linear`, `identity` or `mlp{N}x_gelu`.
        pixel_shuffle: Side of the square of patches folded into one token.
        image_token_id: Id that stands where image embeddings go.
        image_embed_scale: Factor on image embeddings; a language model whose embedding module
            scales what it looks up (Gemma) has the same scale for images.
        tiles: How images are cut into tiles, as values of `model.tiles`; None when they are not.
    """

    model_type = "vistune_composed"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        tower: dict[str, Any] | None = None,
        connector_kind: str = "mlp2x_gelu",
        pixel_shuffle: int = 1,
        image_token_id: int = 0,
        image_embed_scale: float = 1.0,
        tiles: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(vision_config, dict):
            vision_config = vision_config_from(vision_config)
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision_config = vision_config
        self.text_config = text_config
        self.tower = tower
        self.connector_kind = connector_kind
        self.pixel_shuffle = pixel_shuffle
        self.image_token_id = image_token_id
        self.image_embed_scale = image_embed_scale
        self.tiles = tiles
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def tower_plan(self) -> TowerPlan:
        """Which part of the encoder is used."""
        assert self.tower is not None
        return TowerPlan(**{**self.tower, "scales": tuple(self.tower.get("scales", ()))})

    @classmethod
    def compose(
        cls,
        *,
        vision_config: Any,
        text_config: Any,
        tower: TowerPlan,
        connector_kind: str,
        pixel_shuffle: int,
        image_token_id: int,
        image_embed_scale: float,
        tiles: TilesConfig | None = None,
    ) -> ComposedConfig:
        """Builds a config from its typed parts, which keep their choice of attention."""
        chosen = [(part, part._attn_implementation) for part in (vision_config, text_config)]
        config = cls(
            vision_config=vision_config,
            text_config=text_config,
            tower=to_state(tower),
            connector_kind=connector_kind,
            pixel_shuffle=pixel_shuffle,
            image_token_id=image_token_id,
            image_embed_scale=image_embed_scale,
            tiles=None if tiles is None else tiles.model_dump(mode="json"),
        )
        # A config hands its own choice, which is still open, down to its parts.
        for part, attention in chosen:
            part._attn_implementation = attention
        return config


class ComposedVLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A vision-language model made of three parts.

    Args:
        config: What it is made of.
        vision_tower: A loaded tower; built with fresh weights when left out.
        connector: A connector; built when left out.
        language_model: A loaded causal language model; built when left out.
    """

    config_class = ComposedConfig
    config: ComposedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self,
        config: ComposedConfig,
        *,
        vision_tower: nn.Module | None = None,
        connector: nn.Module | None = None,
        language_model: Any = None,
    ) -> None:
        super().__init__(config)
        self.plan = config.tower_plan
        self.grid: VisionGrid = tower_grid(
            config.vision_config, self.plan, pixel_shuffle=config.pixel_shuffle, where="config.json"
        )
        self.image_token_id = int(config.image_token_id)
        self.touch_vision_always = False
        self.fused: FusedTrunk | None = None
        if language_model is None:
            check_config(config.text_config, where="config.json")
            language_model = AutoModelForCausalLM.from_config(
                config.text_config, attn_implementation=register_packed_attention()
            )
        if vision_tower is None:
            vision_tower = build_tower(config.vision_config, self.plan)
        if connector is None:
            connector = build_connector(
                config.connector_kind,
                num_in=features_width(config.vision_config, self.plan) * config.pixel_shuffle**2,
                num_out=int(config.text_config.hidden_size),
            )
            given = False
        else:
            given = True
        self.vision_tower = vision_tower
        self.connector = connector
        self.language_model = language_model
        width = int(config.text_config.hidden_size)
        self.tiles: Tiles | None = None if config.tiles is None else Tiles(width)
        # Whatever a saved config says: any other attention would mix packed samples.
        language_model.config._attn_implementation = register_packed_attention()
        self._finish(keep_weights=given)

    def _finish(self, *, keep_weights: bool) -> None:
        if not keep_weights:
            self.post_init()
            return
        # Transformers initialises weights at this point unless it is building a skeleton.
        with torch.device("meta"):
            self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComposedVLM:
        """Moves and casts the model, but leaves tables such as rotary frequencies in fp32."""
        _compat.apply_exactly(self, lambda: super(ComposedVLM, self)._apply(fn, recurse))
        return self

    def add_tiles(self, tiles: TilesConfig, *, seed: int) -> None:
        """Cuts images into tiles from now on.

        Args:
            tiles: The grids.
            seed: Seed of the newline embedding.
        """
        like = self.get_input_embeddings().weight
        assert isinstance(like, Tensor)
        self.config.tiles = tiles.model_dump(mode="json")
        self.tiles = new_tiles(int(self.config.text_config.hidden_size), seed=seed).to(like)

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules. A head tied to the embeddings belongs to the language model."""
        head = self.language_model.get_output_embeddings()
        embeddings = self.language_model.get_input_embeddings()
        names: tuple[str, ...] = ()
        if head is not None and head.weight is not embeddings.weight:
            names = tuple(name for name, module in self.named_modules() if module is head)
        connector = ("connector",) if self.tiles is None else ("connector", "tiles")
        return ModuleMap(("vision_tower",), connector, ("language_model",), names)

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no gradient reaches (an encoder's mask token)."""
        names = dict(self.vision_tower.named_parameters())
        return frozenset(f"vision_tower.{n}" for n in self.plan.traits.never_reached if n in names)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embedding table."""
        found = self.language_model.get_input_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head."""
        found = self.language_model.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def image_features(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Turns images, or views of them, into embeddings.

        Args:
            pixel_values_NCYX: Preprocessed images or views.

        Returns:
            [N, K, D], K as `grid` says.
        """
        height_px, width_px = pixel_values_NCYX.shape[-2:]
        first = next(self.vision_tower.parameters(), None)
        kind = pixel_values_NCYX.device.type
        trains = any(p.requires_grad for p in self.vision_tower.parameters())
        # A frozen tower runs in its own format: autocast would compute every norm in fp32 and carry
        # the wide residual on, which no gradient asks for.
        autocast = torch.is_autocast_enabled(kind) and trains
        if first is not None and not autocast:
            pixel_values_NCYX = pixel_values_NCYX.to(first.dtype)
        with (
            torch.autocast(kind, enabled=autocast),
            torch.set_grad_enabled(trains and torch.is_grad_enabled()),
        ):
            features_NPD = tower_features(self.vision_tower, self.plan, pixel_values_NCYX)
        features_NPD = pixel_shuffle(
            features_NPD,
            factor=self.grid.downsample,
            height_px=height_px,
            width_px=width_px,
            patch_px=self.grid.patch_px,
        )
        return self._connect(features_NPD)

    def _connect(self, features_NPD: Tensor) -> Tensor:
        first = next(self.connector.parameters(), None)
        if first is not None and not torch.is_autocast_enabled(features_NPD.device.type):
            features_NPD = features_NPD.to(first.dtype)
        out: Tensor = self.connector(features_NPD)
        scale = self.config.image_embed_scale
        return out if scale == 1.0 else out * scale

    def _image_tokens(
        self, pixel_values_NCYX: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> Tensor:
        """Returns the embeddings of all images, end to end: [K, D]."""
        features_NKD = self.image_features(pixel_values_NCYX)
        if self.tiles is None:
            return features_NKD.flatten(0, 1)
        scale = float(self.config.image_embed_scale)
        found: Tensor = self.tiles(features_NKD, image_shapes, scale=scale)
        return found

    def embed(
        self,
        input_ids_BT: Tensor,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """Looks up text embeddings and puts image embeddings where the image token stands.

        Args:
            input_ids_BT: int64 [B, T].
            pixel_values_NCYX: Images in reading order over the whole batch, or None.
            image_shapes: Of each image, where they are cut into tiles.

        Returns:
            [B, T, D].

        Raises:
            ModelError: Image tokens and image features are not equally many.
        """
        is_image_BT = input_ids_BT == self.image_token_id
        # The image token may lie outside the embedding table, so it is never looked up.
        text_BTD: Tensor = self.get_input_embeddings()(input_ids_BT.masked_fill(is_image_BT, 0))
        if pixel_values_NCYX is None:
            image_places(is_image_BT, 0)
            idle = self._idle_vision(text_BTD)
            return text_BTD if idle is None else text_BTD + idle
        features_KD = self._image_tokens(pixel_values_NCYX, image_shapes).to(text_BTD.dtype)
        places_K = image_places(is_image_BT, features_KD.shape[0])
        embeds = text_BTD.flatten(0, 1).index_copy(0, places_K, features_KD)
        return embeds.view_as(text_BTD)

    def _idle_vision(self, like: Tensor) -> Tensor | None:
        """Zero that depends on every trained vision and connector weight, when there are any.

        Without it a row of text alone would leave gradients missing, and with several processes
        the others would wait for them for ever.
        """
        if not torch.is_grad_enabled():
            return None
        tower_trains = any(p.requires_grad for p in self.vision_tower.parameters())
        newline = None if self.tiles is None else self.tiles.image_newline
        own = (*self.connector.parameters(), *(() if newline is None else (newline,)))
        connector_trains = any(p.requires_grad for p in own)
        if not (tower_trains or connector_trains or self.touch_vision_always):
            return None
        if tower_trains or self.touch_vision_always:
            side = self.grid.fixed_size_px or self.grid.patch_px * self.grid.downsample
            pixels = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
            features = self.image_features(pixels)
        else:
            width = features_width(self.config.vision_config, self.plan) * self.grid.downsample**2
            features = self._connect(torch.zeros(1, 1, width, device=like.device, dtype=like.dtype))
        total = features.sum() if newline is None else features.sum() + newline.sum()
        return total.to(like.dtype) * 0.0

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """Runs one packed row up to and including the final norm; see `contract`."""
        embeds_BTD = self.embed(input_ids_BT, pixel_values_NCYX, image_shapes)
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
        hidden = out.last_hidden_state
        assert isinstance(hidden, Tensor)
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
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """As `hidden_states`, at the target positions only: [M, D]. Needs the fused layers."""
        assert self.fused is not None
        return self.fused.target_states(
            self.embed(input_ids_BT, pixel_values_NCYX, image_shapes),
            position_ids_BT,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            tail=tail,
        )

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the output head as the language model does: [M, D] -> [M, V]."""
        return logits_of(self.language_model)(hidden_MD)

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
        image_shapes: tuple[ImageShape, ...] = (),
        labels: None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch.

        Args:
            input_ids: int64 [B, T], image tokens expanded.
            pixel_values: Images in reading order over the batch, [N, 3, Y, X].
            attention_mask: [B, T], 0 on padding.
            position_ids: int64 [B, T].
            past_key_values: Key-value cache.
            inputs_embeds: Instead of `input_ids` and `pixel_values`.
            use_cache: Whether to return a cache.
            logits_to_keep: Positions at the end whose logits are wanted; 0 for all.
            image_shapes: Of each image, where they are cut into tiles.
            labels: Not taken: the loss is computed outside the model.
            kwargs: For the language model.

        Returns:
            Logits [B, T', V] and the cache.

        Raises:
            ModelError: Both or neither of ids and embeddings are given, or labels.
        """
        if labels is not None:
            raise ModelError("labels never enter the model; compute the loss from the logits")
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, pixel_values, image_shapes)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def generation_inputs(
        self,
        *,
        input_ids_BT: Tensor,
        pixel_values: Tensor | None,
        image_shapes: tuple[ImageShape, ...],
    ) -> dict[str, Any]:
        """Returns what the forward pass is given for the images of a batch of prompts."""
        return {"pixel_values": pixel_values, "image_shapes": image_shapes}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_shapes: tuple[ImageShape, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Gives images to the first pass only; afterwards the cache holds them."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = kwargs.get("past_key_values")
        if pixel_values is not None and (cache is None or cache.get_seq_length() == 0):
            inputs |= {"pixel_values": pixel_values, "image_shapes": image_shapes}
        return inputs
