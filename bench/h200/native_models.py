"""Published sizes of transformers' own vision-language models, as configs for native_grid.py."""

from __future__ import annotations

from typing import Any

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_INTERN_VIT = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.1,
}
_QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        **more,
    }


def _qwen25(out: int, text: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": _MROPE, "tie_word_embeddings": tied},
        "vision_config": {**_QWEN25_VISION, "out_hidden_size": out},
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": _qwen25(3584, _text(3584, 18944, 28, 28, 4, vocab_size=152064), tied=False),
    "qwen2.5-vl-3b": _qwen25(2048, _text(2048, 11008, 36, 16, 2, vocab_size=151936), tied=True),
    "qwen3-vl-4b": {
        "model_type": "qwen3_vl",
        "text_config": {
            **_text(2560, 9728, 36, 32, 8, vocab_size=151936, head_dim=128),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
        **_QWEN_IDS,
    },
    "internvl3-2b": {
        "model_type": "internvl",
        "text_config": {
            "model_type": "qwen2",
            **_text(1536, 8960, 28, 12, 2, vocab_size=151674),
            "tie_word_embeddings": False,
        },
        "vision_config": _INTERN_VIT,
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    },
    "smolvlm-2.2b": {
        "model_type": "smolvlm",
        "text_config": {
            "model_type": "llama",
            **_text(2048, 8192, 24, 32, 32, vocab_size=49280, head_dim=64),
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **_SIGLIP,
            "model_type": "smolvlm_vision",
            "image_size": 384,
        },
        "scale_factor": 3,
        "image_token_id": 49190,
        "tie_word_embeddings": False,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            **_text(2560, 10240, 34, 8, 4, vocab_size=262208, head_dim=256),
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
        },
        "vision_config": {**_SIGLIP, "image_size": 896},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
    },
}
