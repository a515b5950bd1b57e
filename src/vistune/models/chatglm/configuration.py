"""The settings of a ChatGLM-6B decoder, under transformers' field names. No weights, no tensors.

`ChatGLMConfig.from_public` reads the `config.json` that the public checkpoints carry, whose own
field names differ, and tells the two published vocabularies apart by their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from vistune.errors import ModelError

NUM_IMAGE_TOKENS_BY_VOCABULARY = {130_528: 0, 150_528: 20_000}
"""Ids in front of the text pieces, by vocabulary size: the first release kept 20,000 for images."""

_PUBLIC_FIELDS = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "inner_hidden_size",
    "layer_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "mask_token_id": "mask_token_id",
    "gmask_token_id": "gmask_token_id",
    "pad_token_id": "pad_token_id",
}


_RESIDUAL = "residual_num_layers"


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a ChatGLM-6B decoder; the defaults are the public 6B model's.

    Args:
        vocab_size: Rows of the embedding and of the head.
        hidden_size: Model width.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Attention heads.
        layer_norm_eps: Epsilon of every LayerNorm.
        max_position_embeddings: Longest sequence the model was trained on, in tokens.
        residual_num_layers: Layer count in the residual's factor sqrt(2 x layers), or None for
            `num_hidden_layers`. It differs only in cut-down copies of a deeper model; the public
            transformers code always has 28, so a public config may say this too.
        rotary_angle_dtype: Number format in which position x frequency is multiplied. "float16"
            reproduces the public half-precision run, whose angles are coarse at high positions.
        bos_token_id: `<sop>`, the first token of the answer.
        eos_token_id: `<eop>`, the end of the answer.
        mask_token_id: `[MASK]`.
        gmask_token_id: `[gMASK]`, the last token of the prompt.
        pad_token_id: `<pad>`.
        initializer_range: Standard deviation of fresh weights.
    """

    model_type = "vistune_chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 130_528
    hidden_size: int = 4096
    intermediate_size: int = 16_384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    residual_num_layers: int | None = None
    rotary_angle_dtype: str = "float32"
    bos_token_id: int = 130_004
    eos_token_id: int = 130_005
    mask_token_id: int = 130_000
    gmask_token_id: int = 130_001
    pad_token_id: int = 3
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def residual_scale(self) -> float:
        """Factor of the normalised input in every residual sum."""
        return math.sqrt(2 * (self.residual_num_layers or self.num_hidden_layers))

    @property
    def num_image_tokens(self) -> int:
        """Ids in front of the text pieces (20,000 in the first release, none since)."""
        return NUM_IMAGE_TOKENS_BY_VOCABULARY.get(self.vocab_size, 0)

    @classmethod
    def from_public(cls, config: Mapping[str, Any], *, where: str) -> ChatGLMConfig:
        """Reads a public `config.json`.

        Args:
            config: Its content.
            where: The file, for messages.

        Raises:
            ModelError: A field is missing or its value is one the decoder does not have.
        """
        missing = sorted(theirs for theirs in _PUBLIC_FIELDS.values() if theirs not in config)
        if missing:
            raise ModelError("the ChatGLM config lacks fields", where=where, got=missing)
        if not config.get("position_encoding_2d", True):
            raise ModelError(
                "the checkpoint uses one-dimensional positions, which ChatGLM-6B does not have",
                where=f"{where} position_encoding_2d",
                expected="true",
            )
        if config.get("pre_seq_len") is not None:
            raise ModelError(
                "p-tuning prefixes are not supported",
                where=f"{where} pre_seq_len",
                got=config["pre_seq_len"],
                fix="load the model without the prefix encoder",
            )
        fields = {ours: config[theirs] for ours, theirs in _PUBLIC_FIELDS.items()}
        if config.get(_RESIDUAL) is not None:
            fields[_RESIDUAL] = int(config[_RESIDUAL])
        fields["num_attention_heads"] = int(fields["num_attention_heads"])
        if fields["hidden_size"] % (4 * fields["num_attention_heads"]):
            raise ModelError(
                "the head width must be a multiple of 4: it is split into two rotary halves",
                where=where,
                got=f"hidden_size {fields['hidden_size']}, {fields['num_attention_heads']} heads",
            )
        return cls(**fields)

    def to_public(self) -> dict[str, Any]:
        """Returns the settings under the public `config.json`'s field names."""
        own = self.to_dict()
        public = {theirs: own[ours] for ours, theirs in _PUBLIC_FIELDS.items()}
        residual = {} if own[_RESIDUAL] is None else {_RESIDUAL: own[_RESIDUAL]}
        return {**public, **residual, "position_encoding_2d": True, "use_cache": True}
