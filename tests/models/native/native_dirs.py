"""Tiny directories of transformers' own vision-language models, as on the hub. Not a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
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


def write_native(kind: str, folder: Path) -> Path:
    """Writes one kind's directory with random weights of a fixed seed; returns it."""
    made = KINDS[kind]
    folder.mkdir(parents=True)
    tokenizer = tokenizer_of(made.specials, made.template)
    tokenizer.save_pretrained(folder)
    config = made.config(tokenizer)
    torch.manual_seed(0)
    model = getattr(transformers, made.model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # scale so that images change the answer
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.processor))
    return folder


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


KINDS: dict[str, Kind] = {
    "qwen2_vl": Kind(
        specials=_QWEN_SPECIALS,
        template=CHATML.replace("@IMAGE@", "<|vision_start|><|image_pad|><|vision_end|>"),
        config=_qwen2_vl,
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 8 * 8, "longest_edge": 24 * 8 * 8},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        model_class="Qwen2VLForConditionalGeneration",
    ),
}
