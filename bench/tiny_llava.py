"""A tiny but real LLaVA and 512 drawn images, made once from transformers' own classes.

What is written: `hf/` (LlavaForConditionalGeneration with its processor), the same weights as two
parts, `clip/` and `llama/`, and `train.json` with `images/`. Every benchmark starts from these.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

IMAGE_PX = 56
PATCH_PX = 14
NUM_IMAGE_TOKENS = (IMAGE_PX // PATCH_PX) ** 2
VOCABULARY = 1024
NUM_SAMPLES = 512
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt of the template `vicuna_v1`, written out for the reference."""

_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 200),
    "yellow": (220, 200, 50),
    "purple": (140, 60, 160),
    "white": (240, 240, 240),
}
_SHAPES = ("square", "circle", "triangle", "stripe")
_PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
_QUESTIONS = (
    "What do you see?",
    "Describe the picture in one sentence.",
    "Which colour is the shape, and where does it stand?",
    "Is there anything besides the background?",
)


def make(folder: Path, *, num_samples: int = NUM_SAMPLES, seed: int = 0) -> None:
    """Writes weights and data into `folder`, unless they are there.

    Args:
        folder: Where to.
        num_samples: Rows of the dataset.
        seed: Seed of weights and pictures.
    """
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = _draw(folder, num_samples, random.Random(seed))
    tokenizer = _train_tokenizer(rows)
    _build(folder, tokenizer, seed)
    (folder / "done").touch()


def _draw(folder: Path, num_samples: int, rng: random.Random) -> list[dict[str, Any]]:
    from PIL import Image, ImageDraw

    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number in range(num_samples):
        width, height = rng.randint(48, 96), rng.randint(48, 96)
        ground, colour = rng.sample(sorted(_COLOURS), 2)
        shape, place = rng.choice(_SHAPES), rng.choice(_PLACES)
        image = Image.new("RGB", (width, height), _COLOURS[ground])
        x = width * (0.25 if "left" in place else 0.75 if "right" in place else 0.5)
        y = height * (0.25 if "top" in place else 0.75 if "bottom" in place else 0.5)
        r = min(width, height) * 0.22
        box = [x - r, y - r, x + r, y + r]
        pen = ImageDraw.Draw(image)
        if shape == "square":
            pen.rectangle(box, fill=_COLOURS[colour])
        elif shape == "circle":
            pen.ellipse(box, fill=_COLOURS[colour])
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=_COLOURS[colour])
        else:
            pen.rectangle([0, y - r / 3, width, y + r / 3], fill=_COLOURS[colour])
        name = f"{number:04d}.png"
        image.save(folder / "images" / name)
        # Answers of very uneven length: averaging per row instead of per token would show.
        answers = (
            colour,
            f"a {colour} {shape}",
            f"There is a {colour} {shape} in the {place} of a {ground} picture.",
            f"The picture is {width} pixels wide and {height} pixels high. Its background is"
            f" {ground}. In the {place} stands one {shape}, and its colour is {colour}.",
        )
        question = rng.choice(_QUESTIONS)
        rows.append(
            {
                "id": f"row-{number}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": rng.choice(answers)},
                ],
            }
        )
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return rows


def _train_tokenizer(rows: list[dict[str, Any]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    texts += [f"{SYSTEM} USER: ASSISTANT:"] * 32
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
    )


def _build(folder: Path, tokenizer: Any, seed: int) -> None:
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=3,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=NUM_IMAGE_TOKENS,
        )
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX}
    )
    model.save_pretrained(folder / "hf")
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "hf")
    clip = CLIPVisionModel(vision)
    clip.load_state_dict(model.model.vision_tower.state_dict())
    clip.save_pretrained(folder / "clip")
    images.save_pretrained(folder / "clip")
    llama = LlamaForCausalLM(text)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
