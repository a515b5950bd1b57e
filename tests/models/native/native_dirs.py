"""Tiny directories of transformers' own vision-language models, as on the hub. Not a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from ahead_kinds import AHEAD_KINDS
from tile_kinds import TILE_KINDS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML over typed parts, as most of these models' own templates are written."""


@dataclass(frozen=True)
class Kind:
    """One kind of model, tiny.

    Args:
        specials: Special tokens beside `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`.
        template: Its chat template.
        config: From the tokenizer to its config.
        processor: The values of its image processor's file.
        model_class: Its class in transformers.
    """

    specials: tuple[str, ...]
    template: str
    config: Callable[[Any], Any]
    processor: dict[str, Any]
    model_class: str


def tokenizer_of(specials: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with special tokens behind its alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials)
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write_native(kind: str, folder: Path, *, wide: bool = False) -> Path:
    """Writes one kind's directory with random weights of a fixed seed; returns it.

    Args:
        kind: Which.
        folder: Made here.
        wide: Widths of the language model are multiples of 64, as blocks of 4-bit weights need.
    """
    made = KINDS[kind]
    folder.mkdir(parents=True)
    tokenizer = tokenizer_of(made.specials, made.template)
    tokenizer.save_pretrained(folder)
    config = made.config(tokenizer)
    if wide:
        _widen(config)
    torch.manual_seed(0)
    model = getattr(transformers, made.model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # scale so that images change the answer
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.processor))
    return folder


def _widen(config: Any) -> None:
    """Makes the language model's widths multiples of 64, and what the tower hands over."""
    text, old = config.get_text_config(), config.get_text_config().hidden_size
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if hasattr(text, name):
            setattr(text, name, 64)
    for name in ("linear_key_head_dim", "linear_value_head_dim"):  # two heads
        if hasattr(text, name):
            setattr(text, name, 32)
    text.num_attention_heads = text.num_attention_heads * 64 // old
    # What the tower hands over is as wide as the language model, under a name of each family's own.
    for name in ("out_hidden_size", "hidden_size", "projection_dim"):
        for part in (config.vision_config, config):
            if getattr(part, name, None) == old:
                setattr(part, name, 64)


def _ids(tokenizer: Any, *names: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(name)) for name in names]


_QWEN_SPECIALS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _qwen2_vl(tokenizer: Any) -> Any:
    start, end, image, video = _ids(tokenizer, *_QWEN_SPECIALS)
    return transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def _qwen(config_class: str, vision: dict[str, Any], text: dict[str, Any]) -> Callable[[Any], Any]:
    """Returns what makes a tiny config of the later Qwens, which differ by their tower."""

    def make(tokenizer: Any) -> Any:
        start, end, image, video = _ids(tokenizer, *_QWEN_SPECIALS)
        return getattr(transformers, config_class)(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                },
                "bos_token_id": None,
                "eos_token_id": None,
                **text,
            },
            vision_config={
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                **vision,
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )

    return make


_GLM_SPECIALS = (
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
_GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""It writes nothing behind an answer: the next turn's mark ends it."""


def _glm4v(tokenizer: Any) -> Any:
    names = ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video", "image", "video")
    ids = _ids(tokenizer, *(f"<|{name}|>" for name in names))
    return transformers.Glm4vConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
        },
        image_start_token_id=ids[0],
        image_end_token_id=ids[1],
        video_start_token_id=ids[2],
        video_end_token_id=ids[3],
        image_token_id=ids[4],
        video_token_id=ids[5],
    )


_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_QWEN_TEMPLATE = CHATML.replace("@IMAGE@", "<|vision_start|><|image_pad|><|vision_end|>")


def _patches(class_name: str, **values: Any) -> dict[str, Any]:
    return {
        "image_processor_type": class_name,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        **values,
    }


_QWEN3_TEXT = {"head_dim": 8}
_QWEN3_VISION = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

KINDS: dict[str, Kind] = {
    "qwen2_vl": Kind(
        specials=_QWEN_SPECIALS,
        template=_QWEN_TEMPLATE,
        config=_qwen2_vl,
        processor=_patches(
            "Qwen2VLImageProcessor", size={"shortest_edge": 8 * 8, "longest_edge": 24 * 8 * 8}
        ),
        model_class="Qwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": Kind(
        specials=_QWEN_SPECIALS,
        template=_QWEN_TEMPLATE,
        config=_qwen(
            "Qwen2_5_VLConfig",
            # Windows of 2 x 2 tokens, so that images have whole ones and broken ones.
            vision={"window_size": 16, "fullatt_block_indexes": [1]},
            text={"tie_word_embeddings": True},
        ),
        processor=_patches("Qwen2VLImageProcessor", min_pixels=8 * 8, max_pixels=24 * 8 * 8),
        model_class="Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Kind(
        specials=_QWEN_SPECIALS,
        template=_QWEN_TEMPLATE,
        config=_qwen("Qwen3VLConfig", vision=_QWEN3_VISION, text=_QWEN3_TEXT),
        processor=_patches(
            "Qwen2VLImageProcessorFast", size={"shortest_edge": 8 * 8, "longest_edge": 24 * 8 * 8}
        ),
        model_class="Qwen3VLForConditionalGeneration",
    ),
    "qwen3_vl_moe": Kind(
        specials=_QWEN_SPECIALS,
        template=_QWEN_TEMPLATE,
        config=_qwen(
            "Qwen3VLMoeConfig",
            vision=_QWEN3_VISION,
            text={
                **_QWEN3_TEXT,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
            },
        ),
        processor=_patches(
            "Qwen2VLImageProcessorFast", size={"shortest_edge": 8 * 8, "longest_edge": 24 * 8 * 8}
        ),
        model_class="Qwen3VLMoeForConditionalGeneration",
    ),
    "glm4v": Kind(
        specials=_GLM_SPECIALS,
        template=_GLM_TEMPLATE,
        config=_glm4v,
        processor=_patches(
            "Glm4vImageProcessor", size={"shortest_edge": 2 * 8 * 8, "longest_edge": 48 * 8 * 8}
        ),
        model_class="Glm4vForConditionalGeneration",
    ),
    **{name: Kind(**values) for name, values in (TILE_KINDS | AHEAD_KINDS).items()},
}
