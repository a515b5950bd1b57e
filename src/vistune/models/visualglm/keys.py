"""VisualGLM's tensor names in its two public layouts, and ChatGLM-6B's own.

The two differ in their prefixes and in how ChatGLM's queries, keys and values are fused: the
transformers layout groups the rows by head, the SwissArmyTransformer (SAT) layout keeps three
blocks, except in checkpoints written before July 2023 and in ports made from those, which group
them by head too. Nothing in a file says which, so the older order has to be asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistune.models.chatglm.configuration import ChatGLMConfig
from vistune.models.keymap import WITH_BATCH_AXIS, Entry, Form, KeyMap, Unread, blocks, interleaved
from vistune.models.keymap import pairs as _pairs
from vistune.models.visualglm.configuration import VisualGLMConfig
from vistune.recipe import QkvOrder

POSITIONS = "transformer.position_embeddings.weight"
"""A table that SAT allocates and ChatGLM never reads."""
_BOTH = ("weight", "bias")


def chatglm_map(config: ChatGLMConfig, *, own: str = "") -> KeyMap:
    """Returns the names of a ChatGLM-6B checkpoint without vision, transformers layout.

    Args:
        config: The decoder's settings.
        own: Prefix of our names, with its dot.
    """
    return KeyMap(
        layout="ChatGLM-6B",
        entries=tuple(
            _decoder(config, head="lm_head.weight", own=own, qkv="by_head"),
        ),
        unread=_layer_frequencies(config),
    )


def hf_map(config: VisualGLMConfig) -> KeyMap:
    """Returns the names of the transformers layout (`image_encoder.*`)."""
    text = config.text_config
    decoder = _decoder(text, head="lm_head.weight", own="language_model.", qkv="by_head")
    return KeyMap(
        layout="VisualGLM transformers",
        entries=(*decoder, *_vision(config, "image_encoder.")),
        unread=_layer_frequencies(text),
    )


def sat_map(config: VisualGLMConfig, *, qkv: QkvOrder = "blocks") -> KeyMap:
    """Returns the names of the SAT layout (`mixins.*`).

    Args:
        config: The model's settings.
        qkv: Order of ChatGLM's fused rows: "blocks", or "by_head" in checkpoints written before
            SAT changed it.
    """
    text = config.text_config
    head = "mixins.chatglm-final.lm_head.weight"
    decoder = _decoder(text, head=head, own="language_model.", qkv=qkv)
    positions = Unread(
        reason="SAT allocates a position table that ChatGLM never reads",
        make=lambda: torch.zeros(text.max_position_embeddings, text.hidden_size),
    )
    return KeyMap(
        layout="VisualGLM SAT",
        entries=(*decoder, *_vision(config, "mixins.eva.model.")),
        unread={
            POSITIONS: positions,
            "mixins.chatglm-attn.rotary_emb.inv_freq": _frequencies(text),
        },
    )


def _frequencies(config: ChatGLMConfig) -> Unread:
    def make() -> Tensor:
        width = config.head_dim // 2
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return (1.0 / 10_000**exponents).half()

    return Unread(reason="rotary frequencies are computed, not learned", make=make)


def _layer_frequencies(config: ChatGLMConfig) -> dict[str, Unread]:
    unread = _frequencies(config)
    return {
        f"transformer.layers.{layer}.attention.rotary_emb.inv_freq": unread
        for layer in range(config.num_hidden_layers)
    }


def _fused(public: str, own: str, names: tuple[str, ...], form: Form) -> list[Entry]:
    return [
        Entry(f"{public}.{kind}", tuple(f"{own}{name}.{kind}" for name in names), form)
        for kind in _BOTH
    ]


def _decoder(config: ChatGLMConfig, *, head: str, own: str, qkv: QkvOrder) -> list[Entry]:
    heads = config.num_attention_heads
    form = interleaved(3, num_heads=heads) if qkv == "by_head" else blocks(3)
    entries = [
        Entry("transformer.word_embeddings.weight", (f"{own}model.embed_tokens.weight",)),
        Entry(head, (f"{own}lm_head.weight",)),
        *_pairs("transformer.", f"{own}model.", [("final_layernorm", "norm")], kinds=_BOTH),
    ]
    same = (
        "input_layernorm",
        "attention.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    for layer in range(config.num_hidden_layers):
        public, ours = f"transformer.layers.{layer}.", f"{own}model.layers.{layer}."
        projections = ("q_proj", "k_proj", "v_proj")
        attention = f"{public}attention.query_key_value"
        entries += _fused(attention, f"{ours}attention.", projections, form)
        entries += _pairs(public, ours, [(name, name) for name in same], kinds=_BOTH)
    return entries


def _vision(config: VisualGLMConfig, prefix: str) -> list[Entry]:
    return [
        *_vit(config, f"{prefix}vit."),
        *_qformer(config, f"{prefix}qformer.transformer."),
        *_pairs(prefix, "connector.", [("glm_proj", "projection")], kinds=_BOTH),
    ]


def _vit(config: VisualGLMConfig, public: str) -> list[Entry]:
    own = "vision_tower."
    modules = (
        ("input_layernorm", "layer_norm1"),
        ("attention.query_key_value", "self_attn.qkv"),
        ("attention.dense", "self_attn.projection"),
        ("post_attention_layernorm", "layer_norm2"),
        ("mlp.dense_h_to_4h", "mlp.fc1"),
        ("mlp.dense_4h_to_h", "mlp.fc2"),
    )
    edges = (
        ("mixins.patch_embedding.proj", "embeddings.patch_embedding"),
        ("mixins.cls.ln_vision", "post_layernorm"),
    )
    class_token = f"{public}transformer.word_embeddings.weight"
    positions = f"{public}transformer.position_embeddings.weight"
    entries = [
        Entry(class_token, (f"{own}embeddings.class_embedding",), WITH_BATCH_AXIS),
        Entry(positions, (f"{own}embeddings.position_embedding",), WITH_BATCH_AXIS),
        *_pairs(public, own, edges, kinds=_BOTH),
    ]
    for layer in range(config.vision_config.num_hidden_layers):
        entries += _pairs(
            f"{public}transformer.layers.{layer}.",
            f"{own}encoder.layers.{layer}.",
            modules,
            kinds=_BOTH,
        )
    return entries


def _qformer(config: VisualGLMConfig, public: str) -> list[Entry]:
    """SAT names a layer's closing norm after the next layer: its `input_layernorm`."""
    own = "connector.qformer."
    num_layers = config.qformer_config.num_hidden_layers
    every = config.qformer_config.cross_attention_frequency
    first_norm = [("layers.0.input_layernorm", "layernorm")]
    query_tokens = f"{public}word_embeddings.weight"
    entries = [
        Entry(query_tokens, ("connector.query_tokens",), WITH_BATCH_AXIS),
        *_pairs(public, own, first_norm, kinds=_BOTH),
    ]
    for layer in range(num_layers):
        theirs, ours = f"{public}layers.{layer}.", f"{own}encoder.layer.{layer}."
        inner = f"{ours}attention.attention."
        entries += _fused(
            f"{theirs}attention.query_key_value", inner, ("query", "key", "value"), blocks(3)
        )
        modules = [
            ("attention.dense", "attention.output.dense"),
            ("post_attention_layernorm", "attention.output.LayerNorm"),
            ("mlp.dense_h_to_4h", "intermediate_query.dense"),
            ("mlp.dense_4h_to_h", "output_query.dense"),
        ]
        if layer % every == 0:
            modules += [
                ("cross_attention.query", "crossattention.attention.query"),
                ("cross_attention.dense", "crossattention.output.dense"),
                ("post_cross_attention_layernorm", "crossattention.output.LayerNorm"),
            ]
            inner = f"{ours}crossattention.attention."
            entries += _fused(
                f"{theirs}cross_attention.key_value", inner, ("key", "value"), blocks(2)
            )
        entries += _pairs(theirs, ours, modules, kinds=_BOTH)
        last = layer + 1 == num_layers
        closing = "final_layernorm" if last else f"layers.{layer + 1}.input_layernorm"
        norm = [(closing, f"encoder.layer.{layer}.output_query.LayerNorm")]
        entries += _pairs(public, own, norm, kinds=_BOTH)
    return entries
