"""The reference: a loop as one writes it by hand over transformers' own LLaVA. Nothing of vistune.

python bench/plain_loop.py FOLDER --mode full --steps 60 --out plain.json
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tiny_llava import SYSTEM


def collate(rows: list[dict[str, Any]], processor: Any, folder: Path) -> dict[str, torch.Tensor]:
    texts, prompts, images = [], [], []
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        prompts.append(f"{SYSTEM} USER: {question} ASSISTANT:")
        texts.append(f"{prompts[-1]} {answer}</s>")
        images.append(Image.open(folder / "images" / row["image"]).convert("RGB"))
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        asked = processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"]
        labels[number, : asked.shape[1]] = -100
    return {**batch, "labels": labels}


def add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=rf".*language_model.*\.({layers})"
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    return model


def start_from(model: Any, initial: Path) -> int:
    """Copies the other loop's random connector and adapters, so that both start alike."""
    pattern = re.compile(r"layers\.\d+\..*\.lora_[AB]|multi_modal_projector\..*")
    given = load_file(initial)
    for number, linear in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            given[f"multi_modal_projector.{linear}.{kind}"] = given[f"connector.{number}.{kind}"]
    given = {m[0]: tensor for name, tensor in given.items() if (m := pattern.search(name))}
    own = {m[0]: p for name, p in model.named_parameters() if (m := pattern.search(name))}
    assert given.keys() == own.keys(), given.keys() ^ own.keys()
    for name, parameter in own.items():
        parameter.data.copy_(given[name])
    return len(own)


def run(
    folder: Path, mode: str, steps: int, batch_size: int, initial: Path | None
) -> dict[str, Any]:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder / "hf")
    processor.tokenizer.padding_side = "right"
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype="float32")
    model.model.vision_tower.requires_grad_(False)
    if mode == "lora":
        model.requires_grad_(False)
        model = add_lora(model)
    if initial is not None:
        assert start_from(model, initial) == (4 if mode == "full" else 4 + 4 * 7 * 2)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    rows = json.loads((folder / "train.json").read_text())
    losses, marks = [], []
    for step in range(steps):
        picked = [rows[(step * batch_size + k) % len(rows)] for k in range(batch_size)]
        batch = collate(picked, processor, folder)
        marks.append(time.process_time())
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    marks.append(time.process_time())
    return {"losses": losses, "marks": marks, "trained": sum(p.numel() for p in trained)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--initial", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = run(args.folder, args.mode, args.steps, args.batch, args.initial)
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
