"""Tiny models whose tokens see some of what follows them, as values of `native_dirs.Kind`."""

from __future__ import annotations

from typing import Any

import transformers

_GEMMA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HALVES = [0.5, 0.5, 0.5]


def _tower(width: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
        "projection_dim": width,
    }


def _text(kind: str, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        **changes,
    }


def _id(tokenizer: Any, text: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(text))


# A window shorter than an image's tokens, so that it is seen whether it bounds them.
_WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}


def _gemma3(tokenizer: Any) -> Any:
    return transformers.Gemma3Config(
        text_config=_text("gemma3_text", tokenizer, query_pre_attn_scalar=8, **_WINDOW),
        vision_config=_tower(32),
        mm_tokens_per_image=4,
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        image_token_index=_id(tokenizer, "<image_soft_token>"),
    )


def _paligemma(kind: str, **changes: Any) -> Any:
    def config(tokenizer: Any) -> Any:
        return transformers.PaliGemmaConfig(
            text_config=_text(kind, tokenizer, **changes),
            vision_config=_tower(32),
            image_token_index=_id(tokenizer, "<image>"),
            projection_dim=32,
            hidden_size=32,
        )

    return config


def _processor(name: str, resample: int) -> dict[str, Any]:
    return {
        "image_processor_type": name,
        "size": {"height": 16, "width": 16},
        "resample": resample,
        "image_mean": _HALVES,
        "image_std": _HALVES,
    }


_PALIGEMMA: dict[str, Any] = {
    "specials": ("<image>", "<bos>", "<eos>"),
    "template": "",
    "processor": _processor("SiglipImageProcessor", 3) | {"image_seq_length": 16},
    "model_class": "PaliGemmaForConditionalGeneration",
}
AHEAD_KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "specials": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        "template": _GEMMA_TEMPLATE,
        "config": _gemma3,
        "processor": _processor("Gemma3ImageProcessor", 2) | {"do_pan_and_scan": None},
        "model_class": "Gemma3ForConditionalGeneration",
    },
    "paligemma": {**_PALIGEMMA, "config": _paligemma("gemma")},
    "paligemma2": {
        **_PALIGEMMA,
        "config": _paligemma(
            "gemma2",
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **_WINDOW,
        ),
    },
}
