"""Speed of the data path on this machine, as ratios inside one run.

    python bench/data_path.py [--photos FOLDER] [--tokenizer FOLDER]

Every figure is CPU time of one process on one thread. Photos are drawn (smooth shapes with grain,
saved as JPEG) unless a folder of real ones is named; the tokenizer is the test fixture unless one
is named. What is measured:

- images: decode, resize, normalise under every `data.image.decode`, against transformers' Pillow
  processor on the same files, and how far the pixels are apart;
- text: rendering, tokens and loss mask, against the bare tokenizer on the same text;
- check: rows per second, image headers included;
- index: finding the rows of a JSON list without parsing it, against `json.load`;
- packing: how full rows are.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))

from data_helpers import CLIP_STD, llama_tokenizer, make_encoder, make_plan

from vistune.data.check import check_sources
from vistune.data.encode import Encoder
from vistune.data.formats.rows import index_rows
from vistune.data.image import ImagePlan, load
from vistune.data.order import plan_epoch
from vistune.data.template import resolve_template
from vistune.recipe import BatchConfig, SourceConfig
from vistune.types import ImageRef, Sample, Turn, VisionGrid

SIDE_PX = 336
LEVEL = 1 / 255 / min(CLIP_STD)
WORDS = (
    "a",
    "bus",
    "is",
    "red",
    "and",
    "two",
    "dogs",
    "in",
    "front",
    "of",
    "it",
    "while",
    "walking",
)


def cpu_s(work: Callable[[], object], *, repeats: int = 3) -> float:
    work()  # warm-up
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def draw_photos(folder: Path, number: int) -> list[Path]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    paths = []
    for k in range(number):
        waves = [np.sin(x / (20 + 3 * k + c)) + np.cos(y / (31 - c)) for c in range(3)]
        values = 128 + 55 * np.stack(waves, axis=-1) + rng.normal(0, 6, (480, 640, 3))
        paths.append(folder / f"{k}.jpg")
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def prepare(refs: list[ImageRef], plan: ImagePlan) -> list[Any]:
    return [plan.apply(load(ref, plan)) for ref in refs]


def decode_all(refs: list[ImageRef], plan: ImagePlan) -> list[Any]:
    return [load(ref, plan) for ref in refs]


def bench_images(paths: list[Path]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": SIDE_PX, "width": SIDE_PX}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=square)
    refs = [ImageRef(path, path.name) for path in paths]

    def theirs(plan: ImagePlan) -> list[Any]:
        out = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            if plan.mode == "pad":  # as LLaVA does in front of the processor
                side = max(image.size)
                canvas = Image.new("RGB", (side, side), plan.pad_colour)
                left, top = ((side - edge) // 2 for edge in image.size)
                canvas.paste(image, (left, top))
                image = canvas
            out.append(processor(image, return_tensors="np")["pixel_values"][0])
        return out

    for mode in ("crop", "pad"):
        exact = make_plan(mode=mode, size_px=SIDE_PX)
        bits = theirs(exact)
        b = cpu_s(functools.partial(theirs, exact))
        for decode in ("exact", "fast", "scaled"):
            plan = exact.model_copy(update={"decode": decode})
            apart = [np.abs(x - y) for x, y in zip(prepare(refs, plan), bits, strict=True)]
            a = cpu_s(functools.partial(prepare, refs, plan))
            only = cpu_s(functools.partial(decode_all, refs, plan))
            print(
                f"images/{mode}/{decode}: {len(refs) / a:.0f}/s, transformers {len(refs) / b:.0f}"
                f"/s, ratio {b / a:.2f}; decoding is {only / a:.0%} of it; levels of 255 apart:"
                f" at most {max(d.max() for d in apart) / LEVEL:.1f}, on average"
                f" {np.mean([d.mean() for d in apart]) / LEVEL:.4f}"
            )


def samples(number: int, *, images: list[ImageRef] | None = None) -> list[Sample]:
    rng = np.random.default_rng(1)
    out = []
    for k in range(number):
        words = rng.choice(WORDS, int(np.exp(rng.normal(np.log(110), 0.85)).clip(10, 900)))
        cut = len(words) // 3
        question: tuple[str | int, ...] = (" ".join(words[:cut]),)
        if images:
            question = (0, "\n", *question)
        turns = (Turn("user", question), Turn("assistant", (" ".join(words[cut:]),)))
        refs = (images[k % len(images)],) if images else ()
        out.append(Sample(str(k), "bench", f"row {k}", turns, refs))
    return out


def bench_text(encoder: Encoder) -> None:
    rows = samples(1000)
    texts = ["".join(s.text for s in encoder.segments(row.turns)) for row in rows]
    backend = encoder.tokenizer.backend_tokenizer
    total = sum(encoder.count_tokens(row) for row in rows)
    ours = cpu_s(lambda: [encoder.tokenise(row) for row in rows])
    bare = cpu_s(lambda: [backend.encode(text, add_special_tokens=False).ids for text in texts])
    print(
        f"text: {total / ours:,.0f} tokens/s with mask, {len(rows) / ours:,.0f} rows/s of"
        f" {total / len(rows):.0f} tokens; the bare tokenizer takes {bare / ours:.0%} of that time"
    )


def bench_check(encoder: Encoder, folder: Path, paths: list[Path]) -> None:
    rows = []
    for k, row in enumerate(samples(2000)):
        question, answer = (turn.text for turn in row.turns)
        talk = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": k, "image": paths[k % len(paths)].name, "conversations": talk})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    source = SourceConfig(path=str(path), images=str(paths[0].parent))
    taken = cpu_s(lambda: check_sources([source], encoder, max_tokens=4096, overlong="drop"))
    print(f"check: {len(rows) / taken:,.0f} rows/s, image headers included")


def bench_index(folder: Path) -> None:
    row = {
        "id": "x",
        "image": "a/b.jpg",
        "conversations": [{"from": "human", "value": " ".join(WORDS) * 12}],
    }
    path = folder / "large.json"
    path.write_text("[" + ",\n".join([json.dumps(row)] * 40_000) + "]")
    size = path.stat().st_size
    ours = cpu_s(lambda: index_rows(path), repeats=2)
    whole = cpu_s(lambda: json.loads(path.read_text()), repeats=1)
    print(
        f"index: {size / ours / 1e6:,.0f} MB/s, {40_000 / ours:,.0f} rows/s;"
        f" json.load of the same list takes {whole / ours:.1f} times as long"
    )


def bench_packing() -> None:
    rng = np.random.default_rng(2)
    for name, base in (("text", 0), ("576 image tokens + text", 576)):
        text = np.exp(rng.normal(np.log(170), 0.85, 20_000)).clip(16, 1400)
        lengths = (base + text).astype(np.int32)
        batch = BatchConfig(max_tokens=4096, tokens=32_768)
        plan = plan_epoch(lengths, batch, seed=0, epoch=0, shuffle=True)
        rows = sum(len(step.rows) for step in plan)
        plan_it = functools.partial(plan_epoch, lengths, batch, seed=0, epoch=0, shuffle=True)
        taken = cpu_s(plan_it, repeats=1)
        padded = float(np.mean(lengths) / np.mean(lengths.reshape(-1, 16).max(axis=1)))
        print(
            f"packing/{name}: rows of 4096 are {int(lengths.sum()) / (rows * 4096):.2%} full"
            f" (random batches of 16, padded: {padded:.2%}); {taken / lengths.size * 1e6:.1f} us"
            " a sample"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of JPEG files")
    parser.add_argument("--tokenizer", type=Path, help="folder of a transformers tokenizer")
    options = parser.parse_args()
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        template = resolve_template("tokenizer", tokenizer)
        encoder = make_encoder(template, tokenizer)
    else:
        encoder = make_encoder("vicuna_v1", llama_tokenizer())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = sorted(options.photos.glob("*.jpg")) if options.photos else draw_photos(folder, 16)
        bench_images(paths)
        bench_text(encoder)
        plan = make_plan(size_px=SIDE_PX)
        full = Encoder(
            encoder.tokenizer, encoder.template, plan, VisionGrid(14), len(encoder.tokenizer)
        )
        bench_check(full, folder, paths)
        bench_index(folder)
        bench_packing()


if __name__ == "__main__":
    main()
