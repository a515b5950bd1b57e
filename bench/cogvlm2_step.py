"""CogVLM2-19B, LoRA on the visual experts' query-key-value projection: step time and memory.

Random weights of the real size, in bfloat16, adapters in float32, one packed row a step: images of
1344 x 1344 (2306 tokens each) and text, targets on half the text. AdamW. Nothing is downloaded.

    python bench/cogvlm2_step.py --images 1 --text 512 --checkpoint-layers 0
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from vistune import _compat
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration

GIB = 2**30


def build(layers: int, tower_layers: int) -> CogVLM2ForConditionalGeneration:
    config = CogVLM2Config(
        num_hidden_layers=layers, vision_config={"num_hidden_layers": tower_layers}
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = CogVLM2ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["vision_expert_query_key_value"])
    inject_adapter_in_model(lora, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def make_row(
    model: CogVLM2ForConditionalGeneration, images: int, text: int
) -> tuple[dict[str, object], torch.Tensor, torch.Tensor]:
    """One row of `images` samples, each an image and `text` tokens of text."""
    config = model.config
    sample = torch.randint(10, 1000, (1 + config.num_image_tokens + text,))
    sample[1 : 1 + config.num_image_tokens] = config.image_token_id
    ids = sample.repeat(images)
    edges = torch.arange(images + 1) * len(sample)
    side = config.vision_config.image_size
    row = {
        "input_ids_BT": ids[None].cuda(),
        "position_ids_BT": torch.arange(len(sample)).repeat(images)[None].cuda(),
        "cu_seqlens": edges.int().cuda(),
        "max_seqlen": len(sample),
        "pixel_values_NCYX": torch.randn(images, 3, side, side, device="cuda"),
    }
    answer = torch.arange(len(sample) - text // 2, len(sample))
    targets = (edges[:-1, None] + answer).flatten()
    return row, (targets - 1).cuda(), ids[targets].cuda()


def measure(
    model: CogVLM2ForConditionalGeneration, args: argparse.Namespace, layers: int
) -> dict[str, object]:
    for index, layer in enumerate(model.model.layers):
        _compat.set_recompute(layer, on=index < layers)
    row, at, targets = make_row(model, args.images, args.text)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.hidden_states(**row)
            loss = F.cross_entropy(model.logits(hidden[0, at]).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(round(float(loss.detach()), 4))
    kept = sorted(times[2:])
    median = kept[len(kept) // 2]
    num_tokens = row["input_ids_BT"].shape[1]
    return {
        "images": args.images,
        "tokens": num_tokens,
        "checkpoint_layers": layers,
        "step_s": round(median, 4),
        "spread_s": round(kept[-1] - kept[0], 4),
        "tokens_per_s": round(num_tokens / median, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "first_step_s": round(times[0], 3),
        "losses": [losses[0], losses[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tower-layers", type=int, default=63)
    parser.add_argument("--checkpoint-layers", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = build(args.layers, args.tower_layers)
    torch.cuda.synchronize()
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights_gib": round(torch.cuda.memory_allocated() / GIB, 2),
        "build_s": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(facts), flush=True)
    for layers in args.checkpoint_layers:
        print(json.dumps(measure(model, args, layers)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
