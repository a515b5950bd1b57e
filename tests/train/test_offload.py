from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from train_fakes import FakeData, resolved_recipe, run

from vistune.parallel.single import optimizer_state
from vistune.recipe import Recipe, ResolvedRecipe, TrainConfig
from vistune.recipe.sizes import resident_optimizer_bytes, visiting_optimizer_bytes
from vistune.train import train
from vistune.train.offload import OffloadedAdamW
from vistune.types import Batch

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON = {"steps": 8, "schedule": "cosine", "warmup_frac": 0.2, "offload": {"optimizer": True}}


class Stopping(FakeData):
    """Ends the run after step 5."""

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        for number, rows in enumerate(super().steps(start_step), start_step):
            if number == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield rows


def losses(folder: Any) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_a_run_and_its_resume_equal_those_without_offload_bit_for_bit(tmp_path: Any) -> None:
    run(resolved_recipe(tmp_path / "plain"))
    off = resolved_recipe(tmp_path / "off", train=ON)
    run(off)
    # Half of it with the state on the device, the rest with it on the host, and the other way.
    for name, first, then in (("out", None, ON), ("back", ON, None)):
        begun, ended = (
            resolved_recipe(tmp_path / name, **({"train": part} if part else {}))
            for part in (first, then)
        )
        assert run(begun, data=Stopping()).steps == 5
        assert run(ended, resume=True).steps == 8
    states = []
    for name in ("plain", "off", "out", "back"):
        assert losses(tmp_path / name) == losses(tmp_path / "plain"), name
        step = tmp_path / name / "checkpoints" / "step_00000008"
        trainer = torch.load(step / "trainer.pt", weights_only=True)
        states.append((load_file(step / "weights.safetensors"), trainer["optimizer"]))
    for weights, optimizer in states[1:]:
        assert all(torch.equal(tensor, states[0][0][name]) for name, tensor in weights.items())
        for name, entries in optimizer.items():
            assert all(torch.equal(t, states[0][1][name][key]) for key, t in entries.items())


def groups(shapes: list[tuple[int, ...]], device: str = "cpu") -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(*shape, generator=drawn).to(device)) for shape in shapes]
    half = len(made) // 2
    return [
        {"params": part, "lr": lr, "weight_decay": decay, "names": [f"{lr}{i}" for i, _ in names]}
        for part, lr, decay in ((made[:half], 1e-2, 0.1), (made[half:], 3e-2, 0.0))
        for names in [list(enumerate(part))]
    ]


def train_both(piece: int, device: str = "cpu") -> list[tuple[list[Tensor], dict[str, Any]]]:
    shapes: list[tuple[int, ...]] = [(7, 11), (5,), (300, 3), (40,), (2, 2), (64, 9)]
    results = []
    for offloaded in (False, True):
        rows = groups(shapes, device)
        arguments: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8}
        optimizer: torch.optim.Optimizer
        if offloaded:
            optimizer = OffloadedAdamW(rows, piece_weights=piece, **arguments)
        else:
            optimizer = torch.optim.AdamW(rows, fused=True, **arguments)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        drawn = torch.Generator().manual_seed(1)
        for step in range(5):
            for number, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=drawn).to(device)
                # One of them has no gradient in some of the steps, as torch's own allows.
                parameter.grad = None if number == 2 and step % 2 else gradient
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
        results.append(([p.detach().cpu() for p in parameters], optimizer_state(optimizer)))
    return results


def assert_equal(results: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
    (weights, state), (offloaded, other) = results
    assert all(torch.equal(a, b) for a, b in zip(weights, offloaded, strict=True))
    for name, entries in state.items():
        assert entries.keys() == other[name].keys()
        assert all(torch.equal(t, other[name][key]) for key, t in entries.items())


def test_updates_equal_torchs_own() -> None:
    assert_equal(train_both(1 << 24))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="is for adamw"):
        TrainConfig.model_validate(
            {"steps": 1, "offload": {"optimizer": True}, "optimizer": "adamw_8bit"}
        )
    with pytest.raises(ValidationError, match="inputs of recomputed layers"):
        TrainConfig.model_validate({"steps": 1, "offload": {"activations": True}})
    assert "offload" in Recipe.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]


def test_bytes_on_the_device() -> None:
    on = TrainConfig.model_validate({"steps": 1, "offload": {"optimizer": True}})
    off = TrainConfig(steps=1)
    count = 10**9
    assert resident_optimizer_bytes(count, off) == 8 * count
    assert resident_optimizer_bytes(count, on) == visiting_optimizer_bytes(count, off) == 0
    assert visiting_optimizer_bytes(count, on) == 3 * 128 * 2**20
    assert visiting_optimizer_bytes(1000, on) == 24_000


@gpu
@needs_cuda
@pytest.mark.parametrize("piece", [1 << 24, 100, 7])
def test_gpu_updates_equal_torchs_own_whatever_the_piece(piece: int) -> None:
    assert_equal(train_both(piece, "cuda"))


@gpu
@needs_cuda
def test_gpu_state_is_not_on_the_device() -> None:
    parameter = nn.Parameter(torch.zeros(1 << 26, device="cuda"))
    row = {"params": [parameter], "names": ["p"], "lr": 1e-3}
    optimizer = OffloadedAdamW([row], betas=(0.9, 0.99), eps=1e-8)
    parameter.grad = torch.ones_like(parameter)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.memory_allocated() == before
    pieces = visiting_optimizer_bytes(
        1 << 26, TrainConfig.model_validate({"steps": 1, "offload": {"optimizer": True}})
    )
    assert torch.cuda.max_memory_allocated() - before <= pieces + 2**20
    assert optimizer.state[parameter]["exp_avg"].is_pinned()


def test_a_whole_run_with_everything_offloaded_gives_the_same_bits(
    tiny: Any, tmp_path: Any
) -> None:
    from our_loop import recipe as bench_recipe

    found = []
    for name, offload in (("plain", {}), ("off", {"activations": True, "optimizer": True})):
        tree = bench_recipe(tiny, tmp_path / name, "lora", steps=4, batch={"samples": 4}).recipe
        changed = tree.model_dump(mode="json", exclude_none=True)
        changed["train"] |= {"checkpoint_layers": 3, "offload": offload}
        resolved = ResolvedRecipe(Recipe.model_validate(changed), sources={}, origin="test")
        console = Console(file=io.StringIO(), record=True, width=200)
        result = train(resolved, console=console)
        said = "nothing is gained): inputs of 3 recomputed layers, optimizer state"
        assert (said in console.export_text()) == bool(offload)
        start, built = map(json.loads, (tmp_path / name / "provenance.jsonl").open())
        assert bool(built["engine"]["offload"]) == bool(offload) and "versions" in start
        found.append(
            (losses(tmp_path / name), load_file(result.checkpoint / "weights.safetensors"))
        )
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
