"""What the engine's options cost and gain: offload, attention, kernels, torch.compile.

    python bench/h200/make.py FOLDER --tokenizer DIR --size 7b
    python bench/h200/make.py FOLDER --tokenizer DIR --size 7b-8
    python bench/h200/options.py FOLDER [--groups offload,attention,layers,tower] [--lines NAME ...]

Each line is a run of engine.py's stage-2 recipe (LoRA, one row of about 12,700 tokens a step) in a
process of its own, with settings changed. Groups `offload`, `attention` and `tower` take the whole
7B model; `layers` takes 8 of its 32 layers, whose ratios are those of all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ENGINE = Path(__file__).with_name("engine.py")
GROUPS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "offload": (
        "7b",
        {
            "nothing": (),
            "optimizer": ("train.offload.optimizer=true",),
            "32 layers recomputed": ("train.checkpoint_layers=32",),
            "32 recomputed, inputs offloaded": (
                "train.checkpoint_layers=32",
                "train.offload.activations=true",
            ),
            "32 recomputed, inputs and optimizer": (
                "train.checkpoint_layers=32",
                "train.offload.activations=true",
                "train.offload.optimizer=true",
            ),
        },
    ),
    "attention": (
        "7b",
        {name: (f"train.attention={name}",) for name in ("varlen", "flex")},
    ),
    "tower": ("7b", {"tower compiled": ("train.compile=blocks",)}),
    "layers": (
        "7b-8",
        {
            "fused": (),
            "transformers' own": ("train.fused=off", "train.kernels=torch"),
            "liger": ("train.fused=off", "train.kernels=liger"),
            "compiled": ("train.fused=off", "train.kernels=torch", "train.compile=blocks"),
            "compiled, padded": (
                "train.fused=off",
                "train.kernels=torch",
                "train.compile=static_blocks",
            ),
        },
    ),
}


def measure(folder: Path, size: str, settings: tuple[str, ...], steps: int) -> dict[str, float]:
    """Runs one line and returns engine.py's figures."""
    command = [sys.executable, str(ENGINE), str(folder), "--rows", "stage2-bf16", "--alone"]
    command += ["--size", size, "--steps", str(steps)]
    if settings:
        command += ["--set", *settings]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("ROW "):
            found: dict[str, float] = json.loads(line[4:])
            return found
    print(done.stdout[-1500:], done.stderr[-2500:], sep="\n", flush=True)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--lines", nargs="*", help="only these lines of the groups")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    for group in args.groups.split(","):
        size, lines = GROUPS[group]
        for name, settings in lines.items():
            if args.lines and name not in args.lines:
                continue
            figures = measure(args.folder, size, settings, args.steps)
            print("OPTION " + json.dumps({"group": group, "name": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
