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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from vistune import _compat
from vistune.models.anyres import Tiles, new_tiles
from vistune.models.attention import register_packed_attention
from vistune.models.connectors import build_connector
from vistune.models.contract import ModuleMap
from vistune.models.facts import vision_config_from
from vistune.models.fused.trunk import FusedTrunk
from vistune.models.language.decoder import check_config
from vistune.models.language.rotary import settle_rotary
from vistune.models.splice import splice
from vistune.models.spliced import SplicedLanguageModel
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
from vistune.types import ImageShape, VisionGrid


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


class ComposedVLM(SplicedLanguageModel):
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
        settle_rotary(language_model)
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
            text_BTD = splice(text_BTD, is_image_BT, None)
            idle = self._idle_vision(text_BTD)
            return text_BTD if idle is None else text_BTD + idle
        return splice(text_BTD, is_image_BT, self._image_tokens(pixel_values_NCYX, image_shapes))

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
