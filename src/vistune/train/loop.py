"""A training run, told in order: device, directory, data, model, steps.

This is where the engines meet; each chapter is a function of its own below or in a module of its
own. The steps themselves are in `fit`.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

from vistune._version import __version__
from vistune.checkpoint.described import keep_small_files
from vistune.checkpoint.files import INHERITED_NAME, write_errors_explained
from vistune.checkpoint.fingerprint import fingerprint_parts, require_same_parts
from vistune.checkpoint.load import read_weights
from vistune.checkpoint.manifest import Manifest, read_manifest
from vistune.device import (
    Device,
    seed_everything,
    select_device,
    set_matmul_precision,
    versions,
)
from vistune.device.launch import Launch, launched
from vistune.device.peak import measure_matmul_tflops
from vistune.errors import DeviceError
from vistune.recipe import BasesConfig, ModelConfig, Recipe, ResolvedRecipe
from vistune.train import collector_paused
from vistune.train.engine import set_up_engine
from vistune.train.failures import load_fix, out_of_memory_explained
from vistune.train.fit import Job, TrainResult, append_json, fit, num_steps
from vistune.train.hooks import (
    ConsoleHook,
    Hook,
    MetricsHook,
    SampleAnswersHook,
    TensorBoardHook,
)
from vistune.train.hooks.samples import Answer
from vistune.train.opening import OpenRun, open_run
from vistune.train.report import (
    print_changed_engine,
    print_data,
    print_result,
    print_tuning,
)
from vistune.train.requirements import require_engine
from vistune.train.room import adviser, settled

if TYPE_CHECKING:
    from vistune.assembly import Blueprint
    from vistune.data.check import CheckReport
    from vistune.data.loader import TrainData
    from vistune.models.flops import ModelWork
    from vistune.models.tune import Tuning
    from vistune.models.whole import WholeModel


def train(
    resolved: ResolvedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains what a recipe describes.

    Args:
        resolved: The recipe with the origin of its values.
        resume: Go on from the newest whole checkpoint of the run directory.
        overwrite: Discard a run that is already there.
        console: Where progress is shown; standard output when left out.

    Returns:
        How the run ended; `interrupted_by` names the signal that ended it early.

    Raises:
        VistuneError: What a user can mend; see the subclasses in `errors`.
    """
    console = console or Console()
    recipe = resolved.recipe
    launch = _one_process()
    device = _device(recipe, console)
    require_engine(recipe, device)
    with open_run(resolved, resume=resume, overwrite=overwrite, console=console) as opened:
        peak_tflops = measure_matmul_tflops(device)  # it draws random numbers: before the seed
        seed_everything(recipe.seed)
        device.reset_peak_memory()
        _import_engines()
        blueprint = _blueprint(recipe, opened)
        for note in blueprint.notes:
            console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
        with write_errors_explained(opened.directory.path):
            opened.set_aside_earlier(needed=blueprint.checkpoint)
            opened.directory.record_start(
                resolved,
                versions=versions(),
                device=device.name,
                resumed_from=opened.progress.step,
            )
            keep_small_files(blueprint.sources, opened.directory.parts)
        recipe = settled(recipe, blueprint, device, opened, console)
        advice = adviser(recipe, blueprint, device)
        data = _data(recipe, blueprint, opened, device, console, launch)
        with (
            collector_paused(),
            out_of_memory_explained(
                what="while the model was loaded", where=device.name, fix=lambda: load_fix(recipe)
            ),
        ):
            built = _model(recipe, blueprint, opened, device, console)
        total_steps = num_steps(recipe, data)
        print_tuning(built.tuning, recipe.train, console)
        job = _job(recipe, opened, device, blueprint, data, built, console, resolved.recipe)
        job.peak_tflops = peak_tflops
        job.advice = advice
        result = fit(job)
    print_result(result, console, total_steps=total_steps)
    return result


def _import_engines() -> None:
    """Imports what needs transformers: after the directory, so that its errors come at once."""
    if "vistune.assembly" in sys.modules:
        return
    with collector_paused():
        import vistune.assembly
        import vistune.data.loader  # noqa: F401
    # What was just imported stays for good; the collector need never look at it again.
    gc.freeze()


def _one_process() -> Launch:
    """Returns which process this is, and refuses to be one of several: they would all train alone.

    Raises:
        DeviceError: Several processes were started.
    """
    launch = launched()
    if launch.size > 1:
        raise DeviceError(
            f"{launch.size} processes were started, and training runs in one",
            where="WORLD_SIZE",
            got=launch.size,
            expected=1,
            fix="start `vistune train` without torchrun",
        )
    return launch


def _device(recipe: Recipe, console: Console) -> Device:
    device = select_device(recipe.device, recipe.dtype)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    set_matmul_precision(recipe.train.matmul_precision)
    console.print(f"device: {device.name} ({device.kind}, {str(device.dtype).split('.')[-1]})")
    if device.note:
        console.print(f"[yellow]note:[/] {device.note}")
    return device


def _blueprint(recipe: Recipe, opened: OpenRun) -> Blueprint:
    """Describes the model: from the recipe, or from the checkpoint that is gone on from.

    A resumed run asks its own checkpoint, because what `model.from_checkpoint` named at the start
    may have been trained further since.
    """
    from vistune.assembly import draw

    if opened.checkpoint is None:
        return draw(recipe)
    manifest = read_manifest(opened.checkpoint)
    bases = _moved_bases(recipe.model, manifest.recipe.get("model", {}))
    here = ModelConfig(from_checkpoint=str(opened.checkpoint), bases=bases)
    blueprint = draw(recipe.model_copy(update={"model": here}))
    # Before anything is loaded.
    require_same_parts(manifest.part_fingerprints, blueprint.sources, where=opened.checkpoint)
    return blueprint


def _moved_bases(now: ModelConfig, before: Mapping[str, Any]) -> BasesConfig:
    """Returns what a resumed run's recipe says of where the parts are that it did not say before.

    What it says still is left to the checkpoint, which names its parts from the root.
    """
    values = now.model_dump(mode="json")

    def other(section: str, key: str) -> str | None:
        value: str | None = (values[section] or {}).get(key)
        return value if value != (before.get(section) or {}).get(key) else None

    return BasesConfig(
        vision_tower=other("bases", "vision_tower") or other("vision_tower", "path"),
        language_model=other("bases", "language_model") or other("language_model", "path"),
        model=other("bases", "model"),
    )


def _data(
    recipe: Recipe,
    blueprint: Blueprint,
    opened: OpenRun,
    device: Device,
    console: Console,
    launch: Launch,
) -> TrainData:
    """Checks every row by its headers, writes down what cannot be used, opens the rest."""
    from vistune.data.check import check_sources
    from vistune.data.loader import TrainData

    report = check_sources(
        recipe.data.train,
        blueprint.encoder,
        max_tokens=recipe.batch.row_tokens,
        overlong=recipe.data.overlong,
        workers=recipe.data.workers,
        rank=launch.rank,
        world_size=launch.size,
    )
    directory = opened.directory
    with write_errors_explained(directory.path):
        directory.check_report.write_text(
            json.dumps(report.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
        report.write_quarantine(directory.quarantine)
    append_json(directory.quarantine, opened.progress.rejected)
    data = TrainData(
        recipe.data,
        recipe.batch,
        blueprint.encoder,
        recipe.seed,
        report=report,
        rank=launch.rank,
        world_size=launch.size,
        pin_memory=device.kind == "cuda",
    )
    print_data(report, console, quarantine=directory.quarantine)
    return data


@dataclass
class _Built:
    """A model whose trained parameters are chosen and in place."""

    model: WholeModel
    tuning: Tuning
    inherited: dict[str, torch.Tensor]
    work: ModelWork | None


def _model(
    recipe: Recipe, blueprint: Blueprint, opened: OpenRun, device: Device, console: Console
) -> _Built:
    """Loads the model, chooses what trains, and puts a resumed run's weights in place."""
    from vistune.assembly import build, lay_over
    from vistune.models.flops import work_of
    from vistune.models.tune import Tuning, apply_tuning
    from vistune.models.tune.quantize import QUANTISED_ROLES, quantize_frozen

    if opened.checkpoint is None:
        model = build(blueprint, seed=recipe.seed, dtype=device.dtype)
        before = _changed_by(blueprint, model)
        tuning = apply_tuning(model, recipe.tune, seed=recipe.seed)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        inherited = {name: tensor for name, tensor in before.items() if name not in trains}
    else:
        bare = replace(blueprint, checkpoint=None)
        model = build(bare, seed=recipe.seed, dtype=device.dtype)
        lay_over(model, opened.checkpoint, parts=blueprint.sources)
        tuning = Tuning(model, recipe.tune)
        has_inherited = (opened.checkpoint / INHERITED_NAME).is_file()
        inherited = read_weights(opened.checkpoint, INHERITED_NAME) if has_inherited else {}
    work = work_of(model, recipe.tune)  # before layers are merged or rounded
    for role in QUANTISED_ROLES:
        held = recipe.tune.held_format(role)
        if held == "int8" or held == "nf4":
            count = quantize_frozen(
                model, role, held, dtype=device.dtype, device=device.torch_device
            )
            console.print(f"frozen weights, {role}: {count} linear layers held in {held}")
    model.to(device.torch_device)
    last = None if opened.checkpoint is None else opened.directory.last_engine()
    engine = set_up_engine(model, recipe, device, console)
    if last is not None:
        print_changed_engine(last, engine, console)
    with write_errors_explained(opened.directory.path):
        opened.directory.record_engine(engine)
    return _Built(model, tuning, inherited, work)


def _changed_by(blueprint: Blueprint, model: WholeModel) -> dict[str, torch.Tensor]:
    """Returns copies of the weights in which a model gone on from differs from its parts.

    Args:
        blueprint: Its checkpoint is what was laid over the parts, adapters merged, if any.
        model: The model, before adapters of this run.
    """
    checkpoint, names = blueprint.checkpoint, set[str]()
    if blueprint.parts.tiles is not None:  # drawn from this run's seed, if it came from nowhere
        names |= {name for name, _ in model.named_parameters() if name.startswith("tiles.")}
    if checkpoint is not None:
        names |= set(read_weights(checkpoint))
    if checkpoint is not None and (checkpoint / INHERITED_NAME).is_file():
        names |= set(read_weights(checkpoint, INHERITED_NAME))
    # A merged adapter has changed the weight of the layer it stood beside.
    names = {f"{n.split('.lora_')[0]}.weight" if ".lora_" in n else n for n in names}
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: state[name].detach().clone() for name in sorted(names)}


def _job(
    recipe: Recipe,
    opened: OpenRun,
    device: Device,
    blueprint: Blueprint,
    data: TrainData,
    built: _Built,
    console: Console,
    written: Recipe,
) -> Job:
    from vistune.models.fused.install import fused_trunk
    from vistune.train.work import row_cost

    fingerprints = fingerprint_parts(blueprint.sources)
    encoder_state = blueprint.encoder.to_state()
    # Read now: the checkpoint gone on from may be rotated away while the run goes on.
    lineage = _lineage(blueprint, opened)

    reads_tail = fused_trunk(built.model) is not None

    def manifest(step: int) -> Manifest:
        return Manifest(
            vistune_version=__version__,
            kind="checkpoint",
            parts=blueprint.parts,
            part_fingerprints=fingerprints,
            tune=recipe.tune.model_dump(mode="json"),
            seed=recipe.seed,
            merged_from=lineage,
            encoder=encoder_state,
            step=step,
            recipe=written.model_dump(mode="json"),
        )

    def hooks(total_steps: int) -> list[Hook]:
        return _hooks(recipe, opened, device, blueprint, built, console, total_steps=total_steps)

    return Job(
        recipe=recipe,
        opened=opened,
        device=device,
        model=built.model,
        groups=built.tuning.groups(recipe.train),
        # The head's width, not the tokenizer's: models pad their vocabularies.
        vocabulary_size=int(built.model.config.get_text_config().vocab_size),
        sources=tuple(dict.fromkeys(data.report.sources)),
        data=data,
        data_fingerprint=_digest(data.report),
        manifest=manifest,
        hooks=hooks,
        console=console,
        reads_tail=reads_tail,
        inherited=built.inherited,
        rehearsals={} if device.kind == "cpu" else _heaviest_steps(data),
        cost=row_cost(built.work, reads_tail=reads_tail),
    )


def _heaviest_steps(data: TrainData) -> dict[int, str]:
    """Returns the steps of the first epoch that need most memory, each with what is most in it."""
    from vistune.data.heaviest import heaviest_rows

    plans = list(itertools.islice(data.plans(0), data.steps_per_epoch(0)))
    rows = heaviest_rows(plans, data.report.lengths, data.report.image_tokens)
    return {row.step: row.what for row in rows}


def _digest(report: CheckReport) -> str:
    """Returns a digest of which rows are used and how many tokens each has."""
    digest = hashlib.sha256(json.dumps([report.sources, report.num_rows]).encode())
    for rows in report.accepted:
        digest.update(rows.tobytes())
    digest.update(report.lengths.tobytes())
    return digest.hexdigest()


def _lineage(blueprint: Blueprint, opened: OpenRun) -> tuple[str, ...]:
    """Returns the checkpoints whose weights this run contains, oldest first."""
    if opened.checkpoint is not None:
        return read_manifest(opened.checkpoint).merged_from
    if blueprint.checkpoint is None:
        return ()
    return (*read_manifest(blueprint.checkpoint).merged_from, str(blueprint.checkpoint))


def _hooks(
    recipe: Recipe,
    opened: OpenRun,
    device: Device,
    blueprint: Blueprint,
    built: _Built,
    console: Console,
    *,
    total_steps: int,
) -> list[Hook]:
    directory = opened.directory
    hooks: list[Hook] = [MetricsHook(directory.metrics)]
    tensorboard = TensorBoardHook(directory.tensorboard) if recipe.log.tensorboard else None
    if tensorboard is not None:
        hooks.append(tensorboard)
    hooks.append(ConsoleHook(console, total_steps=total_steps, live=recipe.log.progress))
    if recipe.sample.prompts:
        hooks.append(
            SampleAnswersHook(
                _asker(recipe, device, blueprint, built.model),
                model=built.model,
                folder=directory.samples,
                every_steps=recipe.sample.every_steps,
                tensorboard=tensorboard,
                device=device.torch_device,
            )
        )
    return hooks


def _asker(
    recipe: Recipe, device: Device, blueprint: Blueprint, model: WholeModel
) -> Callable[[], Sequence[Answer]]:
    """Returns what asks the recipe's questions of the model as it then is."""
    from vistune.generate import Prompt, generate
    from vistune.types import ImageRef, Part, Turn

    asked = [
        (question, name)
        for name in (recipe.sample.images or (None,))
        for question in recipe.sample.prompts
    ]
    prompts = []
    for question, name in asked:
        parts: tuple[Part, ...] = (question,) if name is None else (0, "\n" + question)
        images = [] if name is None else [ImageRef(Path(name).resolve(), name)]
        prompts.append(Prompt(turns=(Turn("user", parts),), images=tuple(images)))

    def ask() -> list[Answer]:
        half = device.dtype == torch.bfloat16
        # Answering runs with a cache and other lengths: compiled blocks would be compiled again.
        with (
            torch.compiler.set_stance("force_eager") if recipe.train.compile else nullcontext(),
            torch.autocast(device.kind, dtype=torch.bfloat16) if half else nullcontext(),
        ):
            texts = generate(
                model,
                blueprint.encoder,
                prompts,
                max_new_tokens=recipe.sample.max_new_tokens,
            )
        return [
            Answer(question, name, text)
            for (question, name), text in zip(asked, texts, strict=True)
        ]

    return ask
