"""The same training as `plain_loop.py`, by `vistune.train`, with the CPU clock read at each step.

python bench/our_loop.py FOLDER --mode full --steps 60 --out ours.json --initial initial.st
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

LORA = {"mode": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0}


def recipe(folder: Path, run_dir: Path, mode: str, *, steps: int, batch: dict[str, Any]) -> Any:
    from vistune.recipe import Recipe, ResolvedRecipe

    full = {"mode": "full"}
    tree = {
        "name": f"tiny-{mode}",
        "run_dir": str(run_dir),
        "device": "cpu",
        "dtype": "fp32",
        "model": {
            "vision_tower": {"path": str(folder / "clip")},
            "language_model": {"path": str(folder / "llama")},
        },
        "tune": {"connector": full, "language": full, "head": full}
        if mode == "full"
        else {"connector": full, "language": LORA},
        "data": {
            "template": "vicuna_v1",
            "train": [
                {"path": str(folder / "train.json"), "images": str(folder / "images")},
            ],
            "image": {"mode": "crop"},
            "shuffle": False,
            "workers": 0,
        },
        "batch": batch,
        "train": {
            "steps": steps,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_frac": 0.0,
            "threads": 1,
        },
    }
    return ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="bench")


def run(
    folder: Path,
    run_dir: Path,
    mode: str,
    *,
    steps: int,
    batch: dict[str, Any],
    initial: Path | None = None,
) -> dict[str, Any]:
    """Trains and returns losses and the process's CPU seconds at the start of each step."""
    from rich.console import Console

    from vistune.train import collector_paused, train

    with collector_paused():
        from vistune.train import fit

    marks: list[float] = []
    measured = fit.backward_step

    def backward_step(strategy: Any, module: Any, rows: Any, **options: Any) -> Any:
        if initial is not None and not marks:
            from safetensors.torch import save_file

            save_file(strategy.state().weights, initial)
        marks.append(time.process_time())
        return measured(strategy, module, rows, **options)

    # The clock is read from outside; the loop itself knows nothing of it.
    fit.backward_step = backward_step
    try:
        train(
            recipe(folder, run_dir, mode, steps=steps, batch=batch),
            overwrite=True,
            console=Console(quiet=True),
        )
    finally:
        fit.backward_step = measured
    marks.append(time.process_time())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {"losses": [json.loads(line)["loss"] for line in lines], "marks": marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=json.loads, default={"samples": 8, "max_tokens": 4096})
    parser.add_argument("--initial", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = run(
        args.folder,
        args.run_dir,
        args.mode,
        steps=args.steps,
        batch=args.batch,
        initial=args.initial,
    )
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
