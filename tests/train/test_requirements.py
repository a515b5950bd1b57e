"""What is refused before a run is discarded, and what a start that failed leaves behind."""

import io
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from train_fakes import resolved_recipe

from our_loop import recipe as bench_recipe
from vistune.data.order import StepPlan
from vistune.device import Device
from vistune.errors import CheckpointError, DeviceError, MissingExtraError, VistuneError
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import loop, train
from vistune.train.fit import Job
from vistune.train.loop import _heaviest_steps
from vistune.train.requirements import require_engine

QUIET = Console(quiet=True)
CPU = Device(torch.device("cpu"), "test", torch.float32)
LONGEST = "the longest row"


def recipe(tiny, run_dir, **sections) -> ResolvedRecipe:
    tree = bench_recipe(tiny, run_dir, "full", steps=2, batch={"samples": 4}).recipe
    changed = tree.model_dump(mode="json", exclude_none=True)
    for name, section in sections.items():
        changed[name] = changed.get(name, {}) | section if isinstance(section, dict) else section
    return ResolvedRecipe(recipe=Recipe.model_validate(changed), sources={}, origin="test")


REFUSED = [
    ({"train": {"attention": "flash_attn"}}, "train.attention"),
    ({"train": {"attention": "varlen"}}, "train.attention"),
    ({"train": {"kernels": "liger"}}, "train.kernels"),
    ({"tune": {"language": {"mode": "freeze", "frozen_format": "fp8"}}}, "tune.language"),
    ({"model": {"vision_tower": {"path": "./not-there"}}}, "model.vision_tower.path"),
]


@pytest.mark.parametrize(("sections", "where"), REFUSED)
def test_a_recipe_that_cannot_run_costs_nobody_a_run(tiny, tmp_path, sections, where):
    train(recipe(tiny, tmp_path / "r"), console=QUIET)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*") if p.is_file())
    with pytest.raises(VistuneError) as raised:
        train(recipe(tiny, tmp_path / "r", **sections), overwrite=True, console=QUIET)
    assert where in str(raised.value)
    after = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*") if p.is_file())
    changed = {p.name for p, _ in set(after) - set(before)} | {
        p.name for p, _ in set(before) - set(after)
    }
    assert changed <= {".lock"}


LATE = [
    ({"train": {"fused": "on", "compile": "static_blocks"}}, "train.compile"),  # the model says
    ({"batch": {"max_tokens": 20}}, "batch.max_tokens"),  # the data say
    ({"tune": {"language": {"mode": "lora", "rank": 2, "targets": ["none"]}}}, "tune.language"),
]


@pytest.mark.parametrize(("sections", "where"), LATE)
def test_what_shows_late_costs_nobody_a_run_either(tiny, tmp_path, sections, where):
    train(recipe(tiny, tmp_path / "r"), console=QUIET)
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    before.pop(tmp_path / "r" / ".lock")
    console = Console(file=io.StringIO(), record=True, width=400)
    with pytest.raises(VistuneError) as raised:
        train(recipe(tiny, tmp_path / "r", **sections), overwrite=True, console=console)
    assert where in str(raised.value)
    assert {p: p.read_bytes() for p in before} == before
    left = {p.name for p in (tmp_path / "r").iterdir()}
    assert left == {p.relative_to(tmp_path / "r").parts[0] for p in before} | {
        ".lock",
        "failed_start",
    }
    assert (tmp_path / "r" / "failed_start" / "recipe.yaml").is_file()
    assert "failed_start" in console.export_text()
    train(recipe(tiny, tmp_path / "r"), resume=True, console=QUIET)  # it is complete, and whole
    train(recipe(tiny, tmp_path / "r"), overwrite=True, console=QUIET)
    assert not (tmp_path / "r" / "failed_start").exists()


def test_a_run_that_was_killed_while_starting_gives_the_earlier_one_back(tiny, tmp_path):
    from vistune.checkpoint.run_dir import RunDirectory

    started = recipe(tiny, tmp_path / "r")
    train(started, console=QUIET)
    metrics = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    directory = RunDirectory.of(started)
    for half in (False, True):  # killed after setting it aside, or on the way
        directory.set_aside()
        if half:
            (tmp_path / "r" / ".earlier").rename(tmp_path / "r" / ".earlier_moving")
            (tmp_path / "r" / ".earlier_moving" / "recipe.yaml").rename(directory.recipe)
        with pytest.raises(CheckpointError, match="already holds a run"):
            train(started, console=QUIET)
        assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == metrics
        assert not list((tmp_path / "r").glob(".earlier*"))
    assert train(started, overwrite=True, console=QUIET).steps == 2
    assert not list((tmp_path / "r").glob(".earlier*"))


def test_a_start_that_failed_before_any_step_is_no_run(tiny, tmp_path):
    too_long = recipe(tiny, tmp_path / "r", batch={"max_tokens": 20})
    with pytest.raises(VistuneError):
        train(too_long, console=QUIET)
    assert (tmp_path / "r" / "recipe.yaml").is_file()
    assert train(recipe(tiny, tmp_path / "r"), console=QUIET).steps == 2
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(recipe(tiny, tmp_path / "r"), console=QUIET)


def test_a_run_never_discards_what_it_goes_on_from(tiny, tmp_path):
    train(recipe(tiny, tmp_path / "r"), console=QUIET)
    on = recipe(tiny, tmp_path / "r").recipe.model_dump(mode="json", exclude_none=True)
    on["model"] = {"from_checkpoint": str(tmp_path / "r")}
    going_on = ResolvedRecipe(recipe=Recipe.model_validate(on), sources={}, origin="test")
    with pytest.raises(CheckpointError, match="discard the checkpoint it goes on from"):
        train(going_on, overwrite=True, console=QUIET)
    assert (tmp_path / "r" / "checkpoints" / "step_00000002").is_dir()


def test_packages_and_devices_are_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    eight_bit = resolved_recipe(tmp_path, train={"steps": 1, "optimizer": "adamw_8bit"}).recipe
    with pytest.raises(MissingExtraError, match=r"train\.optimizer.*\n.*vistune\[qlora\]"):
        require_engine(eight_bit, CPU)
    for held in ("int8", "nf4"):
        for role in ("language", "vision"):
            tune = {role: {"mode": "freeze", "frozen_format": held}}
            with pytest.raises(MissingExtraError, match=f"{role}.frozen_format={held}"):
                require_engine(resolved_recipe(tmp_path, tune=tune).recipe, CPU)
    mps = Device(torch.device("mps"), "test", torch.float32)
    offloaded = {"steps": 1, "offload": {"optimizer": True}}
    with pytest.raises(DeviceError, match="nowhere to move to"):
        require_engine(resolved_recipe(tmp_path, train=offloaded).recipe, mps)
    require_engine(resolved_recipe(tmp_path).recipe, CPU)


def test_out_of_memory_while_loading_names_what_makes_weights_smaller(tiny, tmp_path, monkeypatch):
    def too_much(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "_model", too_much)
    with pytest.raises(VistuneError, match="while the model was loaded") as raised:
        train(recipe(tiny, tmp_path / "r"), console=QUIET)
    assert "tune.language.mode=lora" in str(raised.value)


class Plans:
    """Two steps and the next epoch's first; what a sample holds is given."""

    def __init__(self, lengths: list[int], image_tokens: list[int]) -> None:
        self.report = SimpleNamespace(
            lengths=np.array(lengths), image_tokens=np.array(image_tokens)
        )

    def steps_per_epoch(self, epoch: int) -> int:
        return 2

    def plans(self, start: int) -> Iterator[StepPlan]:
        yield StepPlan(((0, 1), (3,)))
        yield StepPlan(((2,),))
        yield StepPlan(((0, 1, 2, 3),))


@pytest.mark.parametrize(
    ("lengths", "image_tokens", "expected"),
    [
        ([10, 30, 90, 20], [8, 24, 0, 8], {0: "the row with most image tokens", 1: LONGEST}),
        ([10, 30, 20, 20], [8, 24, 0, 8], {0: LONGEST}),
        ([10, 30, 90, 20], [0, 0, 0, 0], {0: "the longest row behind another", 1: LONGEST}),
    ],
)
def test_the_steps_of_the_heaviest_rows_are_rehearsed(lengths, image_tokens, expected):
    assert _heaviest_steps(Plans(lengths, image_tokens)) == expected


@pytest.mark.parametrize("fused", ["off", "on"])
def test_a_rehearsal_over_real_rows_changes_no_bit_of_a_run(tiny, tmp_path, monkeypatch, fused):
    def rehearsed(**fields):
        found = _heaviest_steps(fields["data"])
        assert found
        return Job(**{**fields, "rehearsals": found})

    adapters = {"language": {"mode": "lora", "rank": 2, "dropout": 0.2}}  # draws random numbers
    sections = {"tune": adapters, "data": {"workers": 1}, "train": {"fused": fused}}
    train(recipe(tiny, tmp_path / "a", **sections), console=QUIET)
    monkeypatch.setattr(loop, "Job", rehearsed)
    said = Console(file=io.StringIO(), width=200)
    train(recipe(tiny, tmp_path / "b", **sections), console=said)
    assert "rehearsed: " in said.file.getvalue() and "the longest row" in said.file.getvalue()
    name = "checkpoints/step_00000002/weights.safetensors"
    a, b = (load_file(tmp_path / which / name) for which in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
