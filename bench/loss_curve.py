"""Loss curve, step time and start-up of `vistune.train` against a plain loop, as ratios of one run.

    python bench/loss_curve.py [--steps 60] [--folder DIR] [--repeats 2]

Both loops run in processes of their own with one thread; times are CPU seconds, so that other work
on the machine does not count. Split steps run in one process, since only their losses are wanted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WHOLE = {"samples": 8, "max_tokens": 4096}
SPLITS = {
    "8 rows of 1 sample": {"samples": 8, "max_tokens": 4096, "pack": False},
    "about 2 samples a row": {"samples": 8, "max_tokens": 170},
    "about 4 samples a row": {"samples": 8, "max_tokens": 340},
}
MAX_ERROR = 1e-6


def process(script: str, *arguments: object, out: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(HERE / script), *map(str, arguments), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(out.read_text())


def relative_error(losses: list[float], reference: list[float]) -> float:
    pairs = list(zip(losses, reference, strict=True))
    return sum(abs(a - b) / abs(b) for a, b in pairs) / len(pairs)


def step_s(result: dict[str, Any]) -> float:
    """Median CPU seconds between the starts of two steps; the first two warm up."""
    marks = result["marks"][2:-1]
    gaps = sorted(b - a for a, b in itertools.pairwise(marks))
    return gaps[len(gaps) // 2] if gaps else float("nan")


def compare(mode: str, folder: Path, work: Path, *, steps: int, repeats: int) -> bool:
    initial = work / f"{mode}.safetensors"
    ours, plain = [], []
    for _ in range(repeats):
        common = ("--mode", mode, "--steps", steps, "--initial", initial)
        run_dir = ("--run-dir", work / f"run-{mode}")
        ours.append(process("our_loop.py", folder, *common, *run_dir, out=work / "o.json"))
        plain.append(process("plain_loop.py", folder, *common, out=work / "p.json"))
    reference = plain[0]["losses"]
    error = relative_error(ours[0]["losses"], reference)
    step = [min(map(step_s, results)) for results in (ours, plain)]
    start = [min(result["marks"][0] for result in results) for results in (ours, plain)]
    print(f"\n{mode}: {steps} steps of 8 samples, loss {reference[0]:.4f} -> {reference[-1]:.4f}")
    print(f"  mean relative error of the loss curve  {error:.1e}   (goal {MAX_ERROR:.0e})")
    print(
        f"  CPU time of a step      ours / plain = {step[0] / step[1]:.2f}"
        f"   ({step[0] * 1e3:.0f} / {step[1] * 1e3:.0f} ms)"
    )
    print(
        f"  CPU time to first step  ours / plain = {start[0] / start[1]:.2f}"
        f"   ({start[0]:.2f} / {start[1]:.2f} s)"
    )
    good = error <= MAX_ERROR
    for name, batch in SPLITS.items():
        split = process(
            "our_loop.py",
            folder,
            *("--mode", mode, "--steps", steps, "--batch", json.dumps(batch)),
            *("--run-dir", work / "run-split"),
            out=work / "s.json",
        )
        error = relative_error(split["losses"], reference)
        print(f"  split, {name:22} error  {error:.1e}")
        good &= error <= MAX_ERROR
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where weights and data are kept")
    parser.add_argument("--modes", nargs="+", default=["full", "lora"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "tiny"
        from tiny_llava import make

        make(folder)
        good = [
            compare(mode, folder, Path(temporary), steps=args.steps, repeats=args.repeats)
            for mode in args.modes
        ]
    print("\nlosses agree" if all(good) else "\nLOSSES DIFFER")
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
