"""The settings of a VisualGLM: EVA ViT, Q-Former and ChatGLM decoder. No weights, no tensors.

`VisualGLMConfig.from_public` reads the settings file of either public layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Blip2QFormerConfig, Blip2VisionConfig, PreTrainedConfig

from vistune.errors import ModelError
from vistune.models.chatglm.configuration import NUM_IMAGE_TOKENS_BY_VOCABULARY, ChatGLMConfig
from vistune.types import ImageDefaults, VisionGrid

_SPECIAL_IDS = {"mask_token_id": 0, "gmask_token_id": 1, "bos_token_id": 4, "eos_token_id": 5}
"""Distance of each special id from `[MASK]` in both published vocabularies."""
_MASK_ID_BY_VOCABULARY = {130_528: 130_000, 150_528: 150_000}
_LN_VISION_EPS = 1e-5


class VisualGLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a VisualGLM; the defaults are the public 6B model's.

    Args:
        text_config: The decoder.
        vision_config: The EVA ViT, as transformers' BLIP-2 vision model.
        qformer_config: The Q-Former, as transformers' BLIP-2 Q-Former.
        num_query_tokens: Queries of the Q-Former, and so tokens of an image.
        vision_norm_eps: Epsilon of the norm that closes the ViT; its blocks have their own.
        image_token_id: The id that stands for an image's tokens, or None for the first id past
            the vocabulary. It never reaches the embedding table.
    """

    model_type = "vistune_visualglm"
    sub_configs = {
        "text_config": ChatGLMConfig,
        "vision_config": Blip2VisionConfig,
        "qformer_config": Blip2QFormerConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    qformer_config: Any = None
    num_query_tokens: int = 32
    vision_norm_eps: float = _LN_VISION_EPS
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the three parts' settings from what a file holds."""
        self.text_config = _part(ChatGLMConfig, self.text_config)
        self.vision_config = _part(Blip2VisionConfig, self.vision_config)
        # No dropout: a frozen tower must answer the same twice.
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.qformer_config = _part(Blip2QFormerConfig, self.qformer_config, defaults=still)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_public(cls, config: Mapping[str, Any], *, where: str) -> VisualGLMConfig:
        """Reads a public `config.json` (transformers layout) or `model_config.json` (SAT).

        Args:
            config: Its content.
            where: The file, for messages.

        Raises:
            ModelError: A field is missing or names a variant that VisualGLM does not have.
        """
        sat = "eva_args" in config
        parts = {name: config.get(f"{name}_{'args' if sat else 'config'}") for name in _PARTS}
        absent = [name for name, part in parts.items() if not isinstance(part, Mapping)]
        if absent:
            raise ModelError(
                "the config does not describe a VisualGLM",
                where=where,
                expected="eva_config and qformer_config, or eva_args and qformer_args",
            )
        text = _sat_text(config, where=where) if sat else config
        eva, qformer = dict(parts["eva"] or {}), dict(parts["qformer"] or {})
        return cls(
            text_config=ChatGLMConfig.from_public(text, where=where),
            vision_config=_eva(eva, where=where),
            qformer_config=_qformer(qformer, where=where),
            num_query_tokens=qformer["vocab_size"],
        )

    def to_public(self) -> dict[str, Any]:
        """Returns the transformers layout's `config.json`."""
        return {
            "architectures": ["ChatGLMForConditionalGenerationWithImage"],
            "model_type": "chatglm",
            "image_length": self.num_query_tokens,
            **self.text_config.to_public(),
            **{f"{name}_config": part for name, part in self._public_parts().items()},
        }

    def to_public_sat(self) -> dict[str, Any]:
        """Returns the SAT layout's `model_config.json`."""
        text = self.text_config.to_public()
        return {
            "model_class": "VisualGLMModel",
            "model_parallel_size": 1,
            "layernorm_order": "post",
            "image_length": self.num_query_tokens,
            **text,
            **{f"{name}_args": part for name, part in self._public_parts().items()},
        }

    def _public_parts(self) -> dict[str, dict[str, Any]]:
        vision, qformer = self.vision_config, self.qformer_config
        num_positions = (vision.image_size // vision.patch_size) ** 2 + 1
        every = qformer.cross_attention_frequency
        return {
            "eva": {
                **_public_sizes(vision),
                "vocab_size": 1,
                "layernorm_order": "pre",
                "model_parallel_size": 1,
                "max_sequence_length": num_positions,
                "inner_hidden_size": vision.intermediate_size,
                "use_final_layernorm": False,
                "image_size": [vision.image_size, vision.image_size],
                "pre_len": 1,
                "post_len": 0,
                "in_channels": 3,
                "num_classes": 0,
                "patch_size": vision.patch_size,
            },
            "qformer": {
                **_public_sizes(qformer),
                "vocab_size": self.num_query_tokens,
                "layernorm_order": "post",
                "model_parallel_size": 1,
                "max_sequence_length": 0,
                "is_decoder": [i % every == 0 for i in range(qformer.num_hidden_layers)],
                "cross_attn_hidden_size": qformer.encoder_hidden_size,
            },
        }


_PARTS = ("eva", "qformer")


def vision_grid(config: VisualGLMConfig) -> VisionGrid:
    """Returns image tokens as a function of pixels: as many as the Q-Former has queries."""
    side = int(config.vision_config.image_size)
    # A "patch" larger than the input: no patch tokens, only the queries.
    return VisionGrid(
        patch_px=side + 1, num_extra_tokens=config.num_query_tokens, fixed_size_px=side
    )


def image_defaults(config: VisualGLMConfig) -> ImageDefaults:
    """Returns the public preprocessing: stretched to a square, BLIP-2's mean and deviation."""
    return ImageDefaults(
        size_px=int(config.vision_config.image_size),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample="bicubic",
        mode="resize",
    )


def _part(
    kind: type[PreTrainedConfig],
    value: Mapping[str, Any] | PreTrainedConfig | None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    if isinstance(value, PreTrainedConfig):
        return value
    return kind(**{**(defaults or {}), **(value or {})})


def _public_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "layernorm_epsilon": config.layer_norm_eps,
    }


def _sat_text(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Completes SAT's model_config.json, which leaves out what its model class fixes."""
    text = dict(config)
    text.setdefault("inner_hidden_size", 4 * text.get("hidden_size", 0))
    text.setdefault("layernorm_epsilon", 1e-5)
    shift = NUM_IMAGE_TOKENS_BY_VOCABULARY.get(text.get("vocab_size", 0), 0)
    text.setdefault("pad_token_id", 3 + shift)
    mask_id = _MASK_ID_BY_VOCABULARY.get(text.get("vocab_size", 0))
    unknown = [name for name in _SPECIAL_IDS if name not in text]
    if unknown and mask_id is None:
        raise ModelError(
            "the special ids cannot be told from the vocabulary size",
            where=where,
            got=f"vocab_size {text.get('vocab_size')}",
            expected="130528 or 150528, or " + ", ".join(unknown),
        )
    for name in unknown:
        assert mask_id is not None
        text[name] = mask_id + _SPECIAL_IDS[name]
    # A p-tuning length is written to every SAT config, used or not; its weights would be left over.
    text.pop("pre_seq_len", None)
    return text


def _eva(eva: dict[str, Any], *, where: str) -> Blip2VisionConfig:
    _require(eva, ("hidden_size", "num_layers", "num_attention_heads"), where=f"{where} eva")
    if eva.get("layernorm_order", "pre") != "pre" or eva.get("use_final_layernorm", False):
        raise ModelError(
            "the vision tower is not EVA-g's pre-norm ViT without a final norm in its stack",
            where=f"{where} eva",
            got={k: eva.get(k) for k in ("layernorm_order", "use_final_layernorm")},
        )
    size = eva.get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ModelError("the vision tower's input is not square", where=f"{where} eva", got=size)
    return Blip2VisionConfig(
        hidden_size=eva["hidden_size"],
        intermediate_size=eva.get("inner_hidden_size") or 4 * eva["hidden_size"],
        num_hidden_layers=eva["num_layers"],
        num_attention_heads=eva["num_attention_heads"],
        image_size=sides.pop(),
        patch_size=eva.get("patch_size", 14),
        hidden_act="gelu",
        layer_norm_eps=eva.get("layernorm_epsilon", 1e-6),
    )


def _qformer(qformer: dict[str, Any], *, where: str) -> Blip2QFormerConfig:
    needed = ("hidden_size", "num_layers", "num_attention_heads", "vocab_size")
    _require(qformer, needed, where=f"{where} qformer")
    num_layers = qformer["num_layers"]
    crosses = qformer.get("is_decoder")
    if isinstance(crosses, list) and crosses != [i % 2 == 0 for i in range(num_layers)]:
        raise ModelError(
            "the Q-Former's cross-attention does not stand in every second layer",
            where=f"{where} qformer is_decoder",
            got=crosses,
        )
    return Blip2QFormerConfig(
        hidden_size=qformer["hidden_size"],
        intermediate_size=qformer.get("inner_hidden_size") or 4 * qformer["hidden_size"],
        num_hidden_layers=num_layers,
        num_attention_heads=qformer["num_attention_heads"],
        encoder_hidden_size=qformer.get("cross_attn_hidden_size", 1408),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_act="gelu",
        layer_norm_eps=qformer.get("layernorm_epsilon", 1e-12),
        cross_attention_frequency=2,
    )


def _require(part: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> None:
    missing = [name for name in names if name not in part]
    if missing:
        raise ModelError("the config lacks fields", where=where, got=missing)
