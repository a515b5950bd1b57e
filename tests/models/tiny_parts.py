"""Tiny vision encoders and language models on disk, as a hub would hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import ModelFacts, describe
from vistune.recipe import ModelConfig

SIZE_PX, PATCH_PX = 28, 14
WIDTH = 32


def tokenizer(*, image_token: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 entries, without `<image>` unless asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"] + (["<image>"] if image_token else [])
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


VOCAB = 264  # a little more than the tokenizer's 259, as real tables often are

_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama_tied": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 4}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "granite": (
        "GraniteConfig",
        {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    ),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2, "logit_scale": 0.25}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", {}),
}

TEXT_KINDS = tuple(_TEXT)


def text_config(kind: str = "llama", **changes: Any) -> Any:
    name, special = _TEXT[kind]
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # so that attention differs visibly from an average
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(transformers, name)(**{**shape, **special, **changes})


def write_language(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(text_config(kind, **changes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


_SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE_PX,
    "patch_size": PATCH_PX,
}
_CONV: dict[str, Any] = {"depths": [1, 1, 1], "hidden_sizes": [8, 12, 16], "num_stages": 3}
_VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", _SHAPE),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", _SHAPE),
    "siglip2": (
        "Siglip2VisionConfig",
        "Siglip2VisionModel",
        {**{k: v for k, v in _SHAPE.items() if k != "image_size"}, "num_patches": 4},
    ),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**_SHAPE, "mlp_ratio": 2}),
    "dinov2_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {**_SHAPE, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
    "dinov3": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        {**_SHAPE, "hidden_size": 32, "num_register_tokens": 2},
    ),
    "vit": ("ViTConfig", "ViTModel", _SHAPE),
    "convnext": ("ConvNextConfig", "ConvNextModel", _CONV),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2Model", _CONV),
    "dinov3_convnext": (
        "DINOv3ConvNextConfig",
        "DINOv3ConvNextModel",
        {"depths": [1, 1, 1], "hidden_sizes": [8, 12, 16]},
    ),
}
VISION_KINDS = tuple(_VISION)


def vision_model(kind: str = "clip", **changes: Any) -> Any:
    config_name, model_name, shape = _VISION[kind]
    torch.manual_seed(2)
    config = getattr(transformers, config_name)(**{**shape, **changes})
    return getattr(transformers, model_name)(config).eval()


PREPROCESSOR = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "crop_size": {"height": SIZE_PX, "width": SIZE_PX},
    "size": {"shortest_edge": SIZE_PX},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}


def write_tower(folder: Path, kind: str = "clip", **changes: Any) -> Path:
    vision_model(kind, **changes).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def parts(
    folder: Path,
    *,
    vision: str = "clip",
    text: str = "llama",
    tower: dict[str, Any] | None = None,
    connector: dict[str, Any] | None = None,
) -> ModelConfig:
    """Writes both parts once and returns the recipe's `model` section."""
    vision_dir, text_dir = folder / f"vision_{vision}", folder / f"text_{text}"
    if not vision_dir.exists():
        write_tower(vision_dir, vision)
    if not text_dir.exists():
        write_language(text_dir, text)
    return ModelConfig.model_validate(
        {
            "vision_tower": {"path": str(vision_dir), **(tower or {})},
            "language_model": {"path": str(text_dir)},
            "connector": connector or {},
        }
    )


def composed(folder: Path, *, seed: int = 3, **kinds: Any) -> tuple[ComposedVLM, ModelFacts]:
    config = parts(folder, **kinds)
    facts = describe(config)
    return build_model(config, facts, seed=seed, dtype=torch.float32), facts


@dataclass
class Row:
    """A packed row and its samples one by one."""

    ids: list[Tensor]
    images: list[Tensor | None]

    @property
    def packed(self) -> dict[str, Any]:
        lengths = [len(ids) for ids in self.ids]
        images = [image for image in self.images if image is not None]
        device = self.ids[0].device
        edges = torch.tensor([0, *lengths], device=device).cumsum(0)
        return {
            "input_ids_BT": torch.cat(self.ids)[None],
            "position_ids_BT": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
            "cu_seqlens": edges.to(torch.int32),
            "max_seqlen": max(lengths),
            "pixel_values_NCYX": torch.cat(images) if images else None,
        }


def row(
    facts: ModelFacts,
    *,
    num_text: Sequence[int] = (7, 5, 9),
    with_image: Sequence[bool] = (1, 0, 1),
) -> Row:
    """Three samples of different lengths, the second without an image."""
    made = torch.Generator().manual_seed(4)
    ids, images = [], []
    for length, image in zip(num_text, with_image, strict=True):
        text = torch.randint(3, 259, (length,), generator=made)
        if image:
            num = facts.grid.num_tokens(SIZE_PX, SIZE_PX)
            block = torch.full((num,), facts.image_token_id)
            text = torch.cat([text[:2], block, text[2:]])
        ids.append(text)
        images.append(torch.randn(1, 3, SIZE_PX, SIZE_PX, generator=made) if image else None)
    return Row(ids, images)


def one_by_one(model: ComposedVLM, made: Row) -> list[Tensor]:
    """Logits of each sample in a batch of its own, by the ordinary forward pass."""
    return [
        model(input_ids=ids[None], pixel_values=image).logits[0]
        for ids, image in zip(made.ids, made.images, strict=True)
    ]


def packed_logits(model: ComposedVLM, made: Row) -> list[Tensor]:
    logits = model.logits(model.hidden_states(**made.packed)[0])
    return list(logits.split([len(ids) for ids in made.ids]))


def encoder(facts: ModelFacts, template: Any = None) -> Any:
    """An encoder with a plain question-and-answer template."""
    from vistune.data.encode import Encoder
    from vistune.data.image import ImagePlan
    from vistune.data.template.pieces import PieceTemplate
    from vistune.recipe import ImageConfig

    return Encoder(
        tokenizer=facts.tokenizer,
        template=template
        or PieceTemplate(
            name="test",
            user_open="Q: ",
            user_close="\n",
            answer_cue="A:",
            answer_open=" ",
            answer_close="</s>",
            stop=("</s>",),
        ),
        image_plan=ImagePlan.resolve(ImageConfig(mode="resize"), facts.image_defaults),
        grid=facts.grid,
        image_token_id=facts.image_token_id,
    )
