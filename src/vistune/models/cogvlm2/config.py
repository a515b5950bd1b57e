"""The shape of a CogVLM2 model, readable from the public `config.json` as it stands.

The public file leaves two things to its code: the base of the rotary embedding and the format in
which its angles are computed. Both are keys here.

Source: CogVLM2-Llama3-chat-19B, config.json and remote code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig

from vistune.errors import ModelError

RotaryPrecision = Literal["fp32", "public"]
TemplateVersion = Literal["base", "chat", "vqa"]

CONNECTOR_STRIDE = 2
"""Side of the square of patches that the connector's convolution folds into one token."""
NUM_IMAGE_MARKS = 2
"""Tokens around an image's patches: its learned begin and end vectors."""


class CogVLM2VisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of the EVA2-CLIP-E tower.

    Args:
        hidden_size: Width of a patch feature.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Blocks.
        num_heads: Attention heads.
        num_positions: Learned positions: patches of a full image, plus the class token.
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels.
        in_channels: Colour channels.
        hidden_act: Activation of the MLP; "gelu" is the exact (erf) form.
        layer_norm_eps: Added to the variance in the blocks' norms.
        dropout_prob: Only 0 is supported, which is what every public model has.
    """

    model_type = "vistune_cogvlm2_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1792,
        intermediate_size: int = 15360,
        num_hidden_layers: int = 63,
        num_heads: int = 16,
        num_positions: int = 9217,
        image_size: int = 1344,
        patch_size: int = 14,
        in_channels: int = 3,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        dropout_prob: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.num_positions = num_positions
        self.image_size = image_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.dropout_prob = dropout_prob
        self._check()
        super().__init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of a full image."""
        return self.image_size // self.patch_size

    def _check(self) -> None:
        if self.num_positions != self.grid**2 + 1:
            raise ModelError(
                "the learned positions do not fit the image",
                where="vision_config.num_positions",
                got=self.num_positions,
                expected=f"({self.image_size} / {self.patch_size})^2 + 1 = {self.grid**2 + 1}",
            )
        if self.grid % CONNECTOR_STRIDE:
            raise ModelError(
                "the connector folds squares of 2 x 2 patches",
                where="vision_config.image_size",
                got=f"{self.grid} patches a side",
                expected="an even number",
            )
        if self.hidden_size % self.num_heads:
            raise ModelError(
                "the tower's width does not divide into its heads",
                where="vision_config.num_heads",
                got=f"{self.hidden_size} / {self.num_heads}",
            )
        if self.dropout_prob != 0.0:
            raise ModelError(
                "dropout in the tower is not supported",
                where="vision_config.dropout_prob",
                got=self.dropout_prob,
                expected=0.0,
            )


class CogVLM2Config(PreTrainedConfig):  # type: ignore[misc]
    """Shape of a CogVLM2 model.

    Args:
        vision_config: Shape of the tower, as an object or as the mapping of the public file.
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the decoder.
        intermediate_size: Width inside every SwiGLU: both experts and the connector.
        num_hidden_layers: Decoder layers, each with both experts.
        num_attention_heads: Query heads.
        num_multi_query_heads: Key and value heads.
        rms_norm_eps: Added to the mean square in the decoder's norms.
        max_position_embeddings: Longest context, in tokens.
        initializer_range: Standard deviation of new weights.
        pad_token_id: Padding; the public inputs also write it at every image position.
        bos_token_id: First token of every sample.
        eos_token_id: Token or tokens that end an answer.
        template_version: Which of the three prompts the weights were tuned on.
        tie_word_embeddings: Only False is supported.
        rope_theta: Base of the rotary embedding.
        rotary_precision: "fp32" computes the angles in float32. "public" computes them as the
            public code does, in the format of the stored `inv_freq`: in bfloat16 neighbouring
            positions above 256 share their angles, and only this gives the public bits.
        image_token_id: Token written at every image position; the pad token where None.
    """

    model_type = "vistune_cogvlm2"
    sub_configs = {"vision_config": CogVLM2VisionConfig}
    attribute_map = {"num_key_value_heads": "num_multi_query_heads"}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config: CogVLM2VisionConfig | Mapping[str, Any] | None = None,
        vocab_size: int = 128256,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_multi_query_heads: int = 8,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        pad_token_id: int = 128002,
        bos_token_id: int = 128000,
        eos_token_id: int | list[int] = 128001,
        template_version: TemplateVersion = "chat",
        tie_word_embeddings: bool = False,
        rope_theta: float = 500000.0,
        rotary_precision: RotaryPrecision = "fp32",
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, CogVLM2VisionConfig):
            vision_config = CogVLM2VisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_multi_query_heads = num_multi_query_heads
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.template_version = template_version
        self.rope_theta = rope_theta
        self.rotary_precision = rotary_precision
        self.image_token_id = pad_token_id if image_token_id is None else image_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check()
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        """Tokens one image takes: the folded patches and the two marks around them."""
        return (self.vision_config.grid // CONNECTOR_STRIDE) ** 2 + NUM_IMAGE_MARKS

    def _check(self) -> None:
        if self.tie_word_embeddings:
            raise ModelError(
                "CogVLM2 has a head of its own", where="tie_word_embeddings", expected=False
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ModelError(
                "the width does not divide into heads of even width",
                where="num_attention_heads",
                got=f"{self.hidden_size} / {self.num_attention_heads}",
            )
        if self.num_attention_heads % self.num_multi_query_heads:
            raise ModelError(
                "the query heads do not divide among the key heads",
                where="num_multi_query_heads",
                got=f"{self.num_attention_heads} / {self.num_multi_query_heads}",
            )
        for key, value, known in (
            ("rotary_precision", self.rotary_precision, ("fp32", "public")),
            ("template_version", self.template_version, ("base", "chat", "vqa")),
        ):
            if value not in known:
                raise ModelError(f"unknown {key}", where=key, got=value, expected=", ".join(known))
