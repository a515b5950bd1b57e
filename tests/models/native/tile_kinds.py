"""Tiny models that see an image in tiles, as values of `native_dirs.Kind`. Not a test."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

_HALVES = [0.5, 0.5, 0.5]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# The structure of the public templates; their peculiarities are kept.
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A line break behind every image."""
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""A blank in front of a text, but not of an image; the generation prompt ends before it."""
_MISTRAL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
"""No generation prompt of its own."""
_PADDLE_TEMPLATE = (
    "{% if image_token is not defined %}{% set image_token ="
    " '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' %}{% endif %}<|im_start|>"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ image_token }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ message['content'][0]['text'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Images first; a line break behind a question, the end of text behind an answer."""
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + part['text'] }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Images first, wherever they stand; what it marks as the answer ends before the end token."""


def _text(kind: str, tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }


def _vision(**values: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **values,
    }


def _internvl(tokenizer: Any) -> Any:
    return transformers.InternVLConfig(
        vision_config=_vision(image_size=16, patch_size=4, norm_type="layer_norm"),
        text_config=_text("qwen2", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def _idefics3(tokenizer: Any) -> Any:
    return transformers.Idefics3Config(
        vision_config=_vision(image_size=16, patch_size=4),
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


def _smolvlm(tokenizer: Any) -> Any:
    return transformers.SmolVLMConfig(
        vision_config=_vision(image_size=16, patch_size=4),
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
    )


_SIZES = [[8 * rows, 8 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def _onevision(tokenizer: Any) -> Any:
    tower = _vision(image_size=8, patch_size=2, vision_use_head=False)
    return transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower},
        text_config=_text("qwen2", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_SIZES,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )


def _paddleocr(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return transformers.PaddleOCRVLConfig(
        vision_config=_vision(image_size=16, patch_size=4, spatial_merge_size=2),
        text_config={
            **_text("paddleocr_vl_text", tokenizer),
            "head_dim": 8,
            "rope_parameters": rope,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_START|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_END|>"),
    )


def _mistral3(tokenizer: Any) -> Any:
    return transformers.Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            **_vision(image_size=64, patch_size=4, head_dim=8),
        },
        text_config={**_text("mistral", tokenizer), "head_dim": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )


def _pixtral(tokenizer: Any) -> Any:
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "pixtral",
            **_vision(image_size=64, patch_size=4, head_dim=8),
        },
        text_config={**_text("mistral", tokenizer), "head_dim": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _minicpmv(tokenizer: Any) -> Any:
    text = {
        **_text("qwen3_5_text", tokenizer),
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        },
    }
    return transformers.MiniCPMV4_6Config(
        vision_config=_vision(image_size=16, patch_size=2),
        text_config=text,
        insert_layer_id=0,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )


_PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
_IDEFICS = {
    "specials": (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *_PLACES,
    ),
    "template": _IDEFICS_TEMPLATE,
}
_IDEFICS_PROCESSOR = {
    "size": {"longest_edge": 64},
    "max_image_size": {"longest_edge": 16},
    "do_image_splitting": True,
    "image_mean": _HALVES,
    "image_std": _HALVES,
}

TILE_KINDS: dict[str, dict[str, Any]] = {
    "internvl": {
        "specials": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        "template": _INTERNVL_TEMPLATE,
        "config": _internvl,
        "processor": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 6,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
        "model_class": "InternVLForConditionalGeneration",
    },
    "idefics3": {
        **_IDEFICS,
        "config": _idefics3,
        "processor": {**_IDEFICS_PROCESSOR, "image_processor_type": "Idefics3ImageProcessor"},
        "model_class": "Idefics3ForConditionalGeneration",
    },
    "smolvlm": {
        **_IDEFICS,
        "config": _smolvlm,
        "processor": {**_IDEFICS_PROCESSOR, "image_processor_type": "SmolVLMImageProcessor"},
        "model_class": "SmolVLMForConditionalGeneration",
    },
    "llava_onevision": {
        "specials": ("<image>", "<video>"),
        "template": _ONEVISION_TEMPLATE,
        "config": _onevision,
        "processor": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 8, "width": 8},
            "image_grid_pinpoints": _SIZES,
            "image_mean": _HALVES,
            "image_std": _HALVES,
        },
        "model_class": "LlavaOnevisionForConditionalGeneration",
    },
    "minicpmv4_6": {
        "specials": (
            "<|image_pad|>",
            "<|video_pad|>",
            "<image>",
            "</image>",
            "<slice>",
            "</slice>",
            "<image_id>",
            "</image_id>",
        ),
        "template": _INTERNVL_TEMPLATE.replace("<IMG_CONTEXT>", "<|image_pad|>"),
        "config": _minicpmv,
        "processor": {
            "image_processor_type": "MiniCPMV4_6ImageProcessor",
            "scale_resolution": 16,
            "patch_size": 2,
            "max_slice_nums": 9,
            "image_mean": _HALVES,
            "image_std": _HALVES,
        },
        "model_class": "MiniCPMV4_6ForConditionalGeneration",
    },
    "paddleocr_vl": {
        "specials": (
            "<|IMAGE_START|>",
            "<|IMAGE_END|>",
            "<|IMAGE_PLACEHOLDER|>",
            "<|video_pad|>",
        ),
        "template": _PADDLE_TEMPLATE,
        "config": _paddleocr,
        "processor": {
            "image_processor_type": "PaddleOCRVLImageProcessor",
            "patch_size": 4,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "size": {"shortest_edge": 4 * 8 * 8, "longest_edge": 24 * 8 * 8},
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
        "model_class": "PaddleOCRVLForConditionalGeneration",
    },
    "mistral3": {
        "specials": (
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        ),
        "template": _MISTRAL_TEMPLATE,
        "config": _mistral3,
        "processor": {
            "image_processor_type": "PixtralImageProcessorFast",
            "patch_size": {"height": 4, "width": 4},
            "size": {"longest_edge": 64},
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
        "model_class": "Mistral3ForConditionalGeneration",
    },
    "pixtral": {
        "specials": (
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        ),
        "template": _MISTRAL_TEMPLATE,
        "config": _pixtral,
        "processor": {
            "image_processor_type": "PixtralImageProcessorFast",
            "patch_size": {"height": 4, "width": 4},
            "size": {"longest_edge": 64},
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
        "model_class": "LlavaForConditionalGeneration",
    },
}
if Version(transformers.__version__) < Version("5.23"):
    del TILE_KINDS["minicpmv4_6"]  # refused there
