"""Small decoders and a packed row to run fused layers and transformers' layers over."""

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from vistune.data.collate import pack_row, tail_of
from vistune.models.attention import register_packed_attention
from vistune.types import EncodedSample

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 32,
    "attn_implementation": register_packed_attention(),
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma with erf": GemmaConfig(**SIZES, hidden_act="gelu"),
    # heads and widths that are no power of two
    "qwen3": Qwen3Config(**(SIZES | {"hidden_size": 56, "head_dim": 12}), attention_bias=True),
    # capped scores, a scale of its own, every other layer through a window of 5
    "gemma2": Gemma2Config(
        **SIZES, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=9
    ),
}


def build(name, mode):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).requires_grad_(mode == "full")
    for path, parameter in model.named_parameters():
        if "norm" in path or "bias" in path:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    if mode == "lora":
        config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.layers\..*_proj")
        inject_adapter_in_model(config, model)
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data = torch.randn_like(parameter) * 0.05
    return model.train()


def trained_by(model):
    """What trains behind the embeddings and before the head, in order."""
    named = model.model.named_parameters()
    return [p for path, p in named if p.requires_grad and "embed_tokens" not in path]


def packed_row():
    """Four samples in one row; one has no target, the others a tail of them."""
    samples = [
        EncodedSample(
            id=str(n),
            source="s",
            input_ids=np.arange(n),
            target_mask=np.arange(n) >= (first if first is not None else n),
        )
        for n, first in [(7, 3), (5, None), (9, 8), (4, 1)]
    ]
    row = pack_row(samples)
    tail = tail_of(row)
    assert tail.index_U.tolist() == [2, 3, 4, 5, 6, 19, 20, 21, 22, 23, 24]
    return row, tail


def error(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())
