"""The settings of an MGM: CLIP and ConvNeXt towers, mining, Gemma. No weights, no tensors.

A public MGM config names its towers by path and leaves their sizes out; `MGMConfig.from_public`
reads those off the shapes of the checkpoint's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, GemmaConfig, PreTrainedConfig

from vistune.errors import ModelError
from vistune.types import ImageDefaults, VisionGrid

_CLIP = "model.vision_tower.vision_tower.vision_model."
_AUX = "model.vision_tower_aux."
_CLIP_HEAD_WIDTH = 64

Shapes = Mapping[str, tuple[int, ...]]


class MGMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of an MGM; the defaults are MGM-2B's.

    Args:
        text_config: The Gemma language model.
        vision_config: The low-resolution tower, CLIP.
        aux_widths: Channels of the ConvNeXt's stages.
        aux_depths: Blocks of the ConvNeXt's stages.
        aux_drop_path_rate: Stochastic depth of the ConvNeXt in training. MGM's recipe leaves it
            at 0.1 even though the tower is frozen; here it is off unless asked for.
        connector: The MLP behind the mining.
        vision_select_layer: The CLIP layer whose output is taken.
        image_size_aux: Side of the input picture in pixels.
        image_grid: The low-resolution picture is cut into grid x grid crops.
        image_global: With crops, also take the whole picture, in front of them.
        gemma_erf_gelu: Use the exact GELU in Gemma's MLP, as transformers 4.38.0 did, with which
            MGM-2B was trained; else the tanh form that Gemma was trained with.
        image_token_id: The id that stands for an image's tokens, or None for the first id past
            the vocabulary. It never reaches the embedding table.
    """

    model_type = "vistune_mgm"
    sub_configs = {"text_config": GemmaConfig, "vision_config": CLIPVisionConfig}

    text_config: Any = None
    vision_config: Any = None
    aux_widths: list[int] | None = None
    aux_depths: list[int] | None = None
    aux_drop_path_rate: float = 0.0
    connector: str = "mlp2x_gelu"
    vision_select_layer: int = -2
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    gemma_erf_gelu: bool = False
    image_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the parts' settings from what a file holds; the defaults are MGM-2B's."""
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = GemmaConfig(**{**_GEMMA_2B, **(self.text_config or {})})
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**{**_CLIP_L_336, **(self.vision_config or {})})
        self.aux_widths = list(self.aux_widths or (192, 384, 768, 1536))
        self.aux_depths = list(self.aux_depths or (3, 3, 27, 3))
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        super().__post_init__(**kwargs)

    @property
    def num_low_px(self) -> int:
        """Side of the low-resolution picture before it is cut into crops."""
        return int(self.vision_config.image_size) * self.image_grid

    @property
    def num_patches(self) -> int:
        """CLIP patches of one crop."""
        return int(self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_crops(self) -> int:
        """Crops of a picture, without the global one."""
        return self.image_grid**2

    @property
    def takes_global(self) -> bool:
        """Whether the whole picture is taken besides its crops."""
        return self.image_global and self.image_grid > 1

    @classmethod
    def from_public(cls, config: Mapping[str, Any], shapes: Shapes, *, where: str) -> MGMConfig:
        """Reads a public config.

        Args:
            config: The content of `config.json`: Gemma's settings with MGM's among them, or
                Gemma's under `text` and CLIP's under `vision_tower`.
            shapes: Shapes of the checkpoint's tensors, by public name.
            where: The file, for messages.

        Raises:
            ModelError: The config or the shapes are not an MGM's on Gemma.
        """
        text = dict(config.get("text", config))
        fields = {k: v for k, v in text.items() if k in _GEMMA_FIELDS}
        # Gemma's first configs say "gelu" and mean the tanh form. Transformers reads that word
        # differently from version to version, so it is never passed on.
        activation = text.get("hidden_activation") or text.get("hidden_act")
        fields["hidden_act"] = _TANH_GELU if activation in (None, "gelu") else activation
        vision = config.get("vision_tower")
        select = config.get("mm_vision_select_layer", -2)
        if isinstance(vision, Mapping):
            select = vision.get("mm_vision_select_layer", select)
            clip = {k: v for k, v in vision.items() if k in _CLIP_FIELDS}
        else:
            clip = _clip_from_shapes(shapes, where=where)
        widths, depths = _aux_from_shapes(shapes, where=where)
        return cls(
            text_config=fields,
            vision_config=clip,
            aux_widths=widths,
            aux_depths=depths,
            connector=config.get("mm_projector_type", "mlp2x_gelu"),
            vision_select_layer=select,
            image_size_aux=config.get("image_size_aux", 768),
            image_grid=config.get("image_grid", 1),
            image_global=bool(config.get("image_global", False)),
        )

    def to_public(self) -> dict[str, Any]:
        """Returns a `config.json` as MGM writes it: Gemma's settings with MGM's among them.

        The towers' paths are left out; their weights and sizes are in the checkpoint.
        """
        text = {k: v for k, v in self.text_config.to_dict().items() if k in _GEMMA_FIELDS}
        assert self.aux_widths is not None
        return {
            **text,
            "rope_theta": self.text_config.rope_parameters["rope_theta"],
            "hidden_activation": self.text_config.hidden_act,
            "architectures": ["MGMGemmaForCausalLM"],
            "model_type": "mgm_gemma",
            "tie_word_embeddings": True,
            "vision_tower": {
                **{k: v for k, v in self.vision_config.to_dict().items() if k in _CLIP_FIELDS},
                "mm_vision_select_layer": self.vision_select_layer,
                "mm_vision_select_feature": "patch",
            },
            "mm_projector_type": self.connector,
            "mm_hidden_size": self.vision_config.hidden_size,
            "mm_hidden_size_aux": sum(self.aux_widths),
            "mm_vision_select_layer": self.vision_select_layer,
            "mm_vision_select_feature": "patch",
            "image_size_aux": self.image_size_aux,
            "image_grid": self.image_grid,
            "image_global": self.image_global,
        }


def vision_grid(config: MGMConfig) -> VisionGrid:
    """Returns the tokens of a picture of `image_size_aux`, the one size the model takes."""
    side = round((config.num_patches * config.num_crops) ** 0.5)
    return VisionGrid(
        patch_px=config.image_size_aux // side,
        num_extra_tokens=config.num_patches if config.takes_global else 0,
        fixed_size_px=config.image_size_aux,
    )


def image_defaults(config: MGMConfig) -> ImageDefaults:
    """Returns the public preprocessing of the high-resolution picture: padded to a square."""
    return ImageDefaults(
        size_px=config.image_size_aux,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample="bicubic",
        mode="pad",
    )


_TANH_GELU = "gelu_pytorch_tanh"
_GEMMA_2B = {
    "hidden_act": _TANH_GELU,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256_000,
}
_GEMMA_FIELDS = frozenset(
    {
        *_GEMMA_2B,
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "pad_token_id",
        "rms_norm_eps",
        "rope_theta",
    }
)
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_FIELDS = frozenset({*_CLIP_L_336, "layer_norm_eps"})


def _clip_from_shapes(shapes: Shapes, *, where: str) -> dict[str, Any]:
    patches = _shape(shapes, f"{_CLIP}embeddings.patch_embedding.weight", where=where)
    positions = _shape(shapes, f"{_CLIP}embeddings.position_embedding.weight", where=where)
    inner = _shape(shapes, f"{_CLIP}encoder.layers.0.mlp.fc1.weight", where=where)
    width, patch = patches[0], patches[-1]
    return {
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": _count(shapes, f"{_CLIP}encoder.layers."),
        # Not to be read from shapes; all of OpenAI's CLIP towers have heads of this width.
        "num_attention_heads": max(width // _CLIP_HEAD_WIDTH, 1),
        "image_size": round((positions[0] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
    }


def _aux_from_shapes(shapes: Shapes, *, where: str) -> tuple[list[int], list[int]]:
    num_stages = _count(shapes, f"{_AUX}vision_stages.")
    if num_stages == 0:
        raise ModelError(
            "the checkpoint has no high-resolution tower", where=where, expected=f"{_AUX}*"
        )
    widths = [
        _shape(shapes, f"{_AUX}vision_stages.{i}.blocks.0.norm.weight", where=where)[0]
        for i in range(num_stages)
    ]
    depths = [_count(shapes, f"{_AUX}vision_stages.{i}.blocks.") for i in range(num_stages)]
    return widths, depths


def _shape(shapes: Shapes, name: str, *, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ModelError("the checkpoint is not a whole MGM", where=where, expected=name)
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """Returns how many different indices follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
