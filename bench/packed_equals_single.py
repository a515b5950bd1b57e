"""Loss and gradients of samples packed into one row against the same samples one by one.

    python bench/packed_equals_single.py [--samples 16]

Prints the largest difference of the mean loss and of any gradient, relative to the largest gradient
of its tensor. A sample that saw another one would show here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from our_loop import recipe

MAX_ERROR = 1e-5


def gradients(folder: Path, run_dir: Path, mode: str, batch: dict[str, Any]) -> Any:
    """Returns the loss and the gradients of the first step with these rows."""
    from vistune.assembly import build, draw
    from vistune.data.loader import TrainData
    from vistune.models.tune import apply_tuning
    from vistune.parallel import SingleProcess
    from vistune.train.optim import build_optimizer
    from vistune.train.step import LossModule, backward_step

    settings = recipe(folder, run_dir, mode, steps=1, batch=batch).recipe
    blueprint = draw(settings)
    model = build(blueprint, seed=0, dtype=torch.float32)
    groups = apply_tuning(model, settings.tune, seed=0).groups(settings.train)
    data = TrainData(settings.data, settings.batch, blueprint.encoder, 0)
    rows = next(data.steps(0))
    strategy = SingleProcess()
    module = strategy.prepare(
        LossModule(model.train(), sources=("train",), vocabulary_size=1024),
        lambda _: build_optimizer(model.named_parameters(), groups, settings.train),
    )
    sums = backward_step(
        strategy,
        module,
        rows,
        sources=("train",),
        device=torch.device("cpu"),
        autocast_dtype=None,
        clip_norm=None,
    )
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return len(rows), sums.loss, named


def compare(folder: Path, run_dir: Path, mode: str, samples: int) -> bool:
    packed = {"samples": samples, "max_tokens": 8192}
    rows, loss, wanted = gradients(folder, run_dir, mode, packed | {"pack": False})
    one, packed_loss, got = gradients(folder, run_dir, mode, packed)
    assert (rows, one) == (samples, 1), "the two cuts are not what they should be"
    assert wanted.keys() == got.keys()
    loss_error = abs(loss - packed_loss) / loss
    grad_error = max(
        float((wanted[name] - got[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-12))
        for name in wanted
        if wanted[name].any()
    )
    print(
        f"{mode}: {samples} samples in 1 row against {rows} rows: loss {loss_error:.1e},"
        f" gradients {grad_error:.1e} of their largest ({len(wanted)} tensors;"
        f" goal {MAX_ERROR:.0e})"
    )
    return loss_error <= MAX_ERROR and grad_error <= MAX_ERROR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "tiny"
        from tiny_llava import make

        make(folder)
        run_dir = Path(temporary) / "run"
        good = [compare(folder, run_dir, mode, args.samples) for mode in ("full", "lora")]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
