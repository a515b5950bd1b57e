"""The quick start from nothing to a report, by the same stages that every other run uses.

What is finished is not done again: every stage leaves its result and a mark in `state.json`. A
training run that was killed goes on from its newest checkpoint, an evaluation from its last answer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from vistune.checkpoint.run_dir import RunDirectory
from vistune.device import versions
from vistune.errors import AssetError, CheckpointError
from vistune.evaluate.answerer import GenerationSettings, model_system, plan_for
from vistune.evaluate.runner import RESULTS_NAME, Progress, evaluate
from vistune.evaluate.summary import Summary
from vistune.evaluate.tasks import Question, read_questions
from vistune.quickstart.assets import CATALOGUE
from vistune.quickstart.prepare import EmbeddedDefault, prepare_embedded_default
from vistune.quickstart.report import (
    Notice,
    ReportData,
    RoleCount,
    StageFacts,
    duration,
    headline,
    read_lines,
    write_report,
)
from vistune.recipe import ResolvedRecipe, RoleTune, load_recipe

STAGE1_RECIPE = "quickstart/pretrain"
STAGE2_RECIPE = "quickstart/tune"
# A stand-in's captions are learnt at a lower rate than the recipe's, which suits the first choice.
_STAND_IN_LR = {"smollm2-135m": "train.lr=1.0e-3"}
_ABOUT_QUESTIONS = (
    "Shape and colour: published easy-VQA test images, answers balanced. Name: drawings seen in"
    " training, at another place, size, tilt and background. Position: pairs of drawings that never"
    " met in training. Count: new scenes. Kind of unseen: animal, food or vehicle, asked of"
    " drawings never shown in training."
)
_ANSWERS = GenerationSettings(max_new_tokens=12, batch_size=48, device="cpu", dtype="fp32")
_NUM_SHOWN = 6


@dataclass(frozen=True)
class QuickstartResult:
    """What the quick start made.

    Args:
        model: The exported model, to chat with.
        report: The HTML report.
        summary: The scores.
        is_complete: False when training was interrupted.
    """

    model: Path
    report: Path
    summary: Summary | None
    is_complete: bool


class _State:
    """What is done: step name -> key of its inputs, and seconds spent, over all starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.done: dict[str, str] = found.get("done", {})
        self.seconds: dict[str, float] = found.get("seconds", {})
        self.facts: dict[str, Any] = found.get("facts", {})

    def save(self) -> None:
        text = json.dumps(
            {"done": self.done, "seconds": self.seconds, "facts": self.facts},
            ensure_ascii=False,
            indent=1,
        )
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


class _Steps:
    """Prints a rule for each step, times it and marks it done."""

    def __init__(self, console: Console, state: _State, names: tuple[str, ...]) -> None:
        self.console = console
        self.state = state
        self.names = names

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        number = self.names.index(name) + 1
        self.console.print()
        self.console.print(Rule(f"{number}/{len(self.names)}  {name}", align="left"))
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self.state.seconds[name] = self.state.seconds.get(name, 0.0) + spent
            self.state.save()
        self.console.print(f"[dim]{name}: {duration(spent)}[/]")


_STEPS = (
    "fetch and prepare",
    "train stage 1",
    "train stage 2",
    "export",
    "evaluate",
    "report",
)


def run_quickstart(
    output: Path,
    *,
    overwrite: bool = False,
    cache: Path | None = None,
    overrides: tuple[str, ...] = (),
    limit: int | None = None,
    console: Console | None = None,
    progress: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
    prepare: Callable[..., EmbeddedDefault] = prepare_embedded_default,
) -> QuickstartResult:
    """Fetches, trains, evaluates and reports.

    Args:
        output: Directory of everything it makes.
        overwrite: Train and evaluate again from the start.
        cache: Where fetched and converted files lie; the default cache when left out.
        overrides: `key=value` laid over both stages' recipes.
        limit: Ask only the first held-out questions.
        console: Where progress is shown; standard output when left out.
        progress: Makes the display that answers are reported to as they come.
        prepare: Supplies weights and data.

    Raises:
        VistuneError: What a user can mend.
    """
    console = console or Console(highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _discard(output)
    state = _State(output / "state.json")
    steps = _Steps(console, state, _STEPS)
    model, report = output / "model", output / "report.html"
    with steps.step("fetch and prepare"):
        parts = prepare(cache, say=lambda line: console.print(line, soft_wrap=True, markup=False))
        questions = read_questions(parts.datasets.heldout, images=parts.datasets.images)[:limit]
        console.print(f"{len(questions)} held-out questions")
    recipes = _recipes(output, parts, overrides)
    for name, recipe in zip(_STEPS[1:3], recipes, strict=True):
        with steps.step(name):
            if not _train(recipe, state, name, console):
                console.print("the quick start goes on with the same command")
                return QuickstartResult(model, report, None, is_complete=False)
    with steps.step("export"):
        _export(recipes[1], model, state, console)
    with steps.step("evaluate"), progress() as on_progress:
        summary = _evaluate(output, parts, recipes[0], questions, on_progress)
        results = read_lines(output / "evaluation" / RESULTS_NAME)
    _print_scores(console, summary, results)
    with steps.step("report"):
        data = _report_data(output, parts, recipes, summary, results, state)
        write_report(data, report)
    image = _some_image(results)
    _print_end(console, summary, model=model, report=report, image=image)
    return QuickstartResult(model, report, summary, is_complete=True)


def _discard(output: Path) -> None:
    """Removes what an earlier quick start made here, and nothing else."""
    if not (output / "state.json").is_file():
        return
    for name in ("stage1", "stage2", "model", "evaluation"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("state.json", "report.html"):
        (output / name).unlink(missing_ok=True)


def _recipes(
    output: Path, parts: EmbeddedDefault, overrides: tuple[str, ...]
) -> tuple[ResolvedRecipe, ResolvedRecipe]:
    """Returns both stages' recipes with the paths of this machine filled in."""
    data = parts.datasets

    def at(key: str, path: Path) -> str:
        # Quoted: a path may hold what YAML would take for something else.
        return f"{key}={json.dumps(str(path), ensure_ascii=False)}"

    stage1 = load_recipe(
        STAGE1_RECIPE,
        [
            at("model.vision_tower.path", parts.vision_tower),
            at("model.language_model.path", parts.language_model),
            at("data.train.0.path", data.stage1),
            at("data.train.0.images", data.images),
            at("run_dir", output / "stage1"),
            *filter(None, [_STAND_IN_LR.get(parts.language_model_name)]),
            *overrides,
        ],
    )
    stage2 = load_recipe(
        STAGE2_RECIPE,
        [
            at("model.from_checkpoint", output / "stage1"),
            at("data.train.0.path", data.stage2),
            at("data.train.0.images", data.images),
            at("run_dir", output / "stage2"),
            *overrides,
        ],
    )
    return stage1, stage2


def _train(recipe: ResolvedRecipe, state: _State, name: str, console: Console) -> bool:
    """Trains a stage unless it is done; goes on with one that was killed.

    Returns:
        False when the run was interrupted (it has saved where it was).
    """
    from vistune.train.loop import train

    key = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()
    run = RunDirectory.of(recipe)
    if name in state.done and run.path.is_dir():
        if state.done[name] != key:
            raise CheckpointError(
                f"'{name}' was done with other settings",
                where=str(run.path),
                fix="add --overwrite to start again, or name another --output",
            )
        console.print(f"already done: {run.path}")
        return True
    result = train(recipe, resume=run.recipe.is_file(), console=console)
    if result.interrupted_by is not None:
        return False
    state.facts[name] = [asdict(count) for count in _count_roles(recipe)]
    state.done[name] = key
    state.save()
    return True


def _count_roles(recipe: ResolvedRecipe) -> list[RoleCount]:
    """Counts the parameters of the model as it was trained, adapters included."""
    import torch

    from vistune.assembly import build, draw
    from vistune.models.tune import apply_tuning

    model = build(draw(recipe.recipe), seed=recipe.recipe.seed, dtype=torch.float32)
    tuning = apply_tuning(model, recipe.recipe.tune, seed=recipe.recipe.seed)
    counts = []
    parts: dict[str, RoleTune] = dict(recipe.recipe.tune)
    for row in tuning.table():
        if row.depth == 0:
            part = parts[row.role]
            how = {"freeze": "frozen", "full": "in full"}.get(row.mode, row.mode)
            if part.mode == "lora":
                how = f"LoRA, rank {part.rank}"
            counts.append(RoleCount(row.role, row.num_total, row.num_trainable, how))
    return counts


def _export(recipe: ResolvedRecipe, model: Path, state: _State, console: Console) -> None:
    from vistune.export import export_model

    key = state.done["train stage 2"]
    if state.done.get("export") == key and model.is_dir():
        console.print(f"already done: {model}")
        return
    export_model(RunDirectory.of(recipe).path, to="vistune", output=model, overwrite=True)
    console.print(f"adapters merged; one self-describing directory: {model}")
    state.done["export"] = key
    state.save()


def _evaluate(
    output: Path,
    parts: EmbeddedDefault,
    stage1: ResolvedRecipe,
    questions: list[Question],
    on_progress: Progress | None,
) -> Summary:
    """Scores the exported model, with and without images, next to what stage 1 left."""
    model, before = output / "model", RunDirectory.of(stage1).path
    return evaluate(
        questions,
        [
            model_system("model", model, _ANSWERS, label="after stage 2"),
            model_system(
                "baseline",
                before,
                _ANSWERS,
                label="after stage 1",
                blind=False,
                prompts_of=model,
            ),
        ],
        plan_for(parts.datasets.heldout, _ANSWERS),
        output=output / "evaluation",
        on_progress=on_progress,
    )


def _print_scores(console: Console, summary: Summary, results: list[dict[str, Any]]) -> None:
    for scores in summary.systems.values():
        found = scores.overall
        console.print(
            f"{scores.label:<30} {100 * found.mean:5.1f} %"
            f"  [dim]\\[{100 * found.low:.1f}, {100 * found.high:.1f}][/]"
        )
    console.print()
    # Evenly spaced over the test set, so that they are neither the best nor the worst.
    for row in results[:: max(1, len(results) // _NUM_SHOWN)][:_NUM_SHOWN]:
        mark = "[green]right[/]" if row["scores"]["model"] >= 0.5 else "[red]wrong[/]"
        console.print(Path(row["image"][0]).name if row["image"] else "(no image)", style="dim")
        console.print(f"  {row['question']}", markup=False)
        console.print(f"  {row['answers']['model']}  ", markup=False, end="")
        console.print(f"{mark} [dim](gold: {' / '.join(row['gold'])})[/]")


def _report_data(
    output: Path,
    parts: EmbeddedDefault,
    recipes: tuple[ResolvedRecipe, ResolvedRecipe],
    summary: Summary,
    results: list[dict[str, Any]],
    state: _State,
) -> ReportData:
    def stage(index: int, title: str, what: str, recipe_name: str) -> StageFacts:
        step = _STEPS[1 + index]
        return StageFacts(
            title=title,
            what=what,
            metrics=read_lines(RunDirectory.of(recipes[index]).metrics),
            roles=[RoleCount(**count) for count in state.facts[step]],
            seconds=state.seconds.get(step),
            recipe=recipe_name,
        )

    counts = parts.datasets.counts
    model = output / "model"
    image = _some_image(results)
    return ReportData(
        summary=summary,
        results=results,
        stages=(
            stage(
                0,
                "Stage 1: the connector",
                f"Learns from {counts['stage1_rows']:,} captioned images what the tower's features"
                " mean in words; everything else is frozen.",
                STAGE1_RECIPE,
            ),
            stage(
                1,
                "Stage 2: answering",
                f"Learns from {counts['stage2_rows']:,} conversations, English and Chinese, to"
                " answer questions about images.",
                STAGE2_RECIPE,
            ),
        ),
        notices=_notices(parts),
        versions=summary.versions or versions(),
        device=summary.device,
        timings=[(name, state.seconds[name]) for name in _STEPS if name in state.seconds],
        commands=(
            ("Talk to the model about an image of yours, or one of the held-out ones:",
             f"vistune chat {model} --image {image}"),
            ("See every setting of stage 2 and where it comes from:",
             f"vistune recipe show {STAGE2_RECIPE}"),
            ("Score it on questions of your own, next to the same model without images:",
             f"vistune eval {model} QUESTIONS.jsonl --images FOLDER"),
            ("Write the adapters for PEFT, and the connector beside them:",
             f"vistune export {output / 'stage2'} --to adapter --output {output / 'adapter'}"),
        ),
        about_questions=_ABOUT_QUESTIONS,
        remarks=parts.remarks,
    )  # fmt: skip


def _notices(parts: EmbeddedDefault) -> list[Notice]:
    """Returns origin and licence of what was used, read from the catalogue by notice folder."""
    used = {notice.parent.name for notice in parts.notices}
    notices = [
        Notice(asset.name, asset.label, asset.licence, asset.note)
        for asset in CATALOGUE.values()
        if f"{asset.package}-{asset.version}" in used
    ]
    if len(notices) != len(parts.notices):
        raise AssetError("a fetched package is not in the catalogue", got=sorted(used))
    return notices


def _some_image(results: list[dict[str, Any]]) -> str:
    """Returns an image to try the model on: that of the first held-out question with one."""
    return next((row["image"][0] for row in results if row["image"]), "IMAGE")


def _print_end(
    console: Console, summary: Summary, *, model: Path, report: Path, image: str
) -> None:
    console.print()
    console.print(Rule(style="green"))
    console.print(headline(summary), style="bold", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)
    console.print(f"talk to it: vistune chat {model} --image {image}", soft_wrap=True)
