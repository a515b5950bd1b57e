"""MGM (Mini-Gemini) on Gemma: two towers, patch-info mining, images among the text.

The model takes one picture per image, the high-resolution one; the low-resolution pictures are
made from it here, as MGM makes them. CLIP and Gemma are transformers'; the ConvNeXt and the mining
are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import register_packed_attention
from vistune.models.contract import ModuleMap
from vistune.models.fused.trunk import FusedTrunk
from vistune.models.mgm.configuration import MGMConfig, vision_grid
from vistune.models.mgm.convnext import ConvNeXtStages, joined_map
from vistune.models.mgm.mining import MGMConnector, tiles
from vistune.models.splice import idle, splice
from vistune.models.spliced import SplicedLanguageModel
from vistune.types import ImageShape, VisionGrid

_HIGH_RES_STEP_PX = 32


class MGMForConditionalGeneration(SplicedLanguageModel):
    """The whole model. See the module for what it is made of.

    Source: MGM-2B and MGM-2B-HD. One thing differs unless `aux_drop_path_rate` says so: MGM's
    recipe leaves stochastic depth on in the frozen high-resolution tower.
    """

    config_class = MGMConfig
    config: MGMConfig
    _no_split_modules = ["GemmaDecoderLayer", "CLIPEncoderLayer", "ConvNeXtBlock"]

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
        with _own_format(self.vision_tower, pictures_NCYX.device.type):
            pictures_NCYX = _as_weights(pictures_NCYX, self.vision_tower)
            out = self.vision_tower(pictures_NCYX, output_hidden_states=True)
        features: Tensor = out.hidden_states[self.config.vision_select_layer][:, 1:]
        return features

    def high_features(self, pixels_NCYX: Tensor) -> Tensor:
        """Returns the ConvNeXt's joined map, [N, C, Y, X]."""
        with _own_format(self.vision_tower_aux, pixels_NCYX.device.type):
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
        return low, parts, _resized(maps, maps.shape[-1] // grid)

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

    def embed(
        self,
        input_ids_BT: Tensor,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """Embeds text and puts the images in their places, all multiplied by Gemma's factor.

        Args:
            input_ids_BT: int64 [B, T]; an image stands as a run of `image_token_id`.
            pixel_values_NCYX: Images in reading order, or None.
            image_shapes: None: every picture has the one size.

        Returns:
            [B, T, D].

        Raises:
            ModelError: Image tokens and images do not match in number.
        """
        assert not image_shapes
        at_image_BT = input_ids_BT == self.image_token_id
        table = self.get_input_embeddings()
        text_BTD = table(input_ids_BT.masked_fill(at_image_BT, 0))
        if pixel_values_NCYX is None:
            return splice(text_BTD, at_image_BT, None) + idle(
                self.image_embeddings,
                (self.vision_tower, self.vision_tower_aux, self.connector),
                side_px=self.config.image_size_aux,
                like=text_BTD,
                always=self.touch_vision_always,
            )
        images_NKD = self.image_embeddings(pixel_values_NCYX).to(text_BTD.dtype)
        # The factor is rounded to the embeddings' number format first, as Gemma's own is.
        factor = torch.tensor(
            _compat.embedding_scale(table), dtype=text_BTD.dtype, device=text_BTD.device
        )
        return splice(text_BTD, at_image_BT, (images_NKD * factor).flatten(0, 1))


def _resized(pictures_NCYX: Tensor, side: int) -> Tensor:
    return F.interpolate(pictures_NCYX, size=(side, side), mode="bilinear", align_corners=False)


@contextmanager
def _own_format(tower: nn.Module, kind: str) -> Iterator[None]:
    """Runs a frozen tower in its weights' format: autocast would make every norm's input fp32."""
    trains = any(p.requires_grad for p in tower.parameters())
    with (
        torch.autocast(kind, enabled=trains and torch.is_autocast_enabled(kind)),
        torch.set_grad_enabled(trains and torch.is_grad_enabled()),
    ):
        yield


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
