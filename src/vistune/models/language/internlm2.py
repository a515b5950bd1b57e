"""InternLM2 as a Llama: the config, and the tensors' names and layout, both ways.

InternLM2 computes what Llama computes. Its checkpoints differ in two things: names, and one fused
`wqkv` matrix whose rows are grouped by key head (that group's query heads, its key, its value).

Source: InternLM2-chat-1.8B, config.json and remote code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vistune.errors import ModelError
from vistune.models.keymap import Entry, Form, KeyMap

MODEL_TYPE = "internlm2"
# Our key: the public key. Everything else in a public config is named below or refused.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REQUIRED_KEYS = _SHARED_KEYS[:5]
_DEFAULT_ROPE_THETA = 10000.0
_SCALINGS = ("dynamic", "linear")


def internlm2_to_llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Returns the Llama config of a public InternLM2 config.

    Args:
        config: The public `config.json`. `rope_scaling` is `{type, factor}` (or `rope_type`) with
            the type "dynamic" or "linear", or null.

    Raises:
        ModelError: A size is missing, or the config asks for biases or for another scaling.
    """
    missing = [key for key in _REQUIRED_KEYS if config.get(key) is None]
    if missing:
        raise ModelError(
            "the InternLM2 config lacks sizes", where="config.json", got=", ".join(missing)
        )
    if config.get("bias"):
        raise ModelError(
            "InternLM2 with biases in its projections is not supported",
            where="config.json: bias",
            got=config["bias"],
            expected=False,
        )
    settings = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    settings.setdefault("tie_word_embeddings", False)
    return LlamaConfig(**settings, rope_parameters=_rope_parameters(config))


def llama_to_internlm2_config(config: LlamaConfig) -> dict[str, Any]:
    """Returns the public InternLM2 config of a Llama config.

    Raises:
        ModelError: The Llama model has something InternLM2 has no key for.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    for key, got, expected in (
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("head_dim", config.head_dim, head_dim),
        ("rope_type", kind, kind if kind in ("default", *_SCALINGS) else "default"),
    ):
        if got != expected:
            raise ModelError(
                "InternLM2 has no form for this Llama model", where=key, got=got, expected=expected
            )
    public: dict[str, Any] = {key: config.to_dict().get(key) for key in _SHARED_KEYS}
    scaling = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": MODEL_TYPE,
        **public,
        "bias": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }


def internlm2_keys(config: LlamaConfig) -> KeyMap:
    """Returns the table of names: public InternLM2 to `LlamaForCausalLM`.

    Args:
        config: The model's Llama config.
    """
    fused = grouped_heads(num_groups=config.num_key_value_heads, head_dim=config.head_dim)
    entries = [
        Entry("model.tok_embeddings.weight", ("model.embed_tokens.weight",)),
        Entry("model.norm.weight", ("model.norm.weight",)),
        Entry("output.weight", ("lm_head.weight",)),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
        entries.append(Entry(f"{prefix}attention.wqkv.weight", parts, fused))
        entries += [
            Entry(f"{prefix}{public}.weight", (f"{prefix}{own}.weight",))
            for public, own in (
                ("attention.wo", "self_attn.o_proj"),
                ("feed_forward.w1", "mlp.gate_proj"),
                ("feed_forward.w2", "mlp.down_proj"),
                ("feed_forward.w3", "mlp.up_proj"),
                ("attention_norm", "input_layernorm"),
                ("ffn_norm", "post_attention_layernorm"),
            )
        ]
    return KeyMap(layout="InternLM2", entries=tuple(entries))


def grouped_heads(*, num_groups: int, head_dim: int) -> Form:
    """Returns the form of a fused projection grouped by key head.

    The rows are `num_groups` groups; each holds its query heads, then one key, then one value.

    Args:
        num_groups: Key heads.
        head_dim: Rows of one head.
    """

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        groups = tensor.reshape(num_groups, -1, head_dim, *tensor.shape[1:])
        query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
        return (
            query.flatten(0, 2).contiguous(),
            key.flatten(0, 1).contiguous(),
            value.flatten(0, 1).contiguous(),
        )

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        groups = [part.reshape(num_groups, -1, head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 2)

    return Form(split=split, join=join)


def public_frequencies(config: LlamaConfig, *, longest_tokens: int) -> Tensor:
    """Rotary frequencies of the public code once it has seen a text of some length.

    With dynamic scaling a text beyond `max_position_embeddings` stretches the frequencies. The
    public code keeps them stretched for every later text, short ones included; here every text has
    its own (`rotary`), so that an answer does not depend on what was asked before. This is for
    comparing with outputs of the public code only.

    Args:
        config: The model's Llama config, with dynamic scaling.
        longest_tokens: Longest text seen so far.

    Returns:
        float32 [head_dim / 2].
    """
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=longest_tokens)
    assert isinstance(frequencies, Tensor)
    return frequencies


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    base = {"rope_theta": float(config.get("rope_theta", _DEFAULT_ROPE_THETA))}
    scaling = config.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "default", **base}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return {"rope_type": "default", **base}
    if kind not in _SCALINGS or not isinstance(scaling.get("factor"), (int, float)):
        raise ModelError(
            "unknown scaling of the rotary embedding",
            where="config.json: rope_scaling",
            got=scaling,
            expected=" or ".join(f"{{type: {name}, factor: NUMBER}}" for name in _SCALINGS),
        )
    return {"rope_type": kind, "factor": float(scaling["factor"]), **base}
