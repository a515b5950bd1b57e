"""A real model behind the runner: batched greedy answers, and choices by log-probability."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vistune.assembly import Assembled, Origin, load_assembled, stands_on_bases
from vistune.checkpoint.load import resolve_checkpoint
from vistune.checkpoint.manifest import read_manifest
from vistune.data.encode import Encoder
from vistune.device import Device, select_device, versions
from vistune.evaluate.runner import Answer, EvaluationPlan, System
from vistune.evaluate.tasks import Question
from vistune.generate import Prompt, generate, score_choices


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made.

    Args:
        max_new_tokens: Longest answer.
        batch_size: Questions answered at once.
        device: Device name.
        dtype: Number format name.
    """

    max_new_tokens: int = 64
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"


class ModelAnswerer:
    """Answers questions with a loaded model, greedily.

    Args:
        assembled: The model.
        device: Where it is.
        settings: How answers are made.
    """

    def __init__(self, assembled: Assembled, device: Device, settings: GenerationSettings) -> None:
        self.assembled = assembled
        self.device = device
        self.settings = settings

    @property
    def batch_size(self) -> int:
        """Questions answered at once."""
        return self.settings.batch_size

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers freely, with greedy decoding."""
        start = time.perf_counter()
        texts = generate(
            self.assembled.model,
            self.assembled.encoder,
            [Prompt(question.turns, question.images) for question in questions],
            max_new_tokens=self.settings.max_new_tokens,
        )
        return self._timed(questions, texts, start)

    def choose(self, questions: Sequence[Question]) -> list[Answer]:
        """Chooses the option the model finds likeliest.

        An option's score is its log-probability over its number of tokens, so that a long option
        is not worse for being long.
        """
        start = time.perf_counter()
        texts = []
        for question in questions:
            scores = score_choices(
                self.assembled.model,
                self.assembled.encoder,
                Prompt(question.turns, question.images),
                question.choices,
            )
            best = max(range(len(scores)), key=scores.__getitem__)
            texts.append(question.choices[best])
        return self._timed(questions, texts, start)

    def _timed(
        self, questions: Sequence[Question], texts: Sequence[str], start: float
    ) -> list[Answer]:
        self.device.synchronize()
        share_s = (time.perf_counter() - start) / len(questions)
        encode = self.assembled.encoder.tokenizer.encode
        return [
            Answer(q.id, text.strip(), len(encode(text, add_special_tokens=False)), share_s)
            for q, text in zip(questions, texts, strict=True)
        ]


def model_system(
    name: str,
    path: Path,
    settings: GenerationSettings,
    *,
    label: str,
    blind: bool = True,
    prompts_of: Path | None = None,
    origin: Origin | None = None,
) -> System:
    """Returns a system that loads a model when it is first needed.

    Args:
        name: Short fixed name.
        path: Run, checkpoint or exported directory.
        settings: How answers are made.
        label: What tables call it.
        blind: Ask it without images too.
        prompts_of: A model whose template and image plan are used instead of its own, so that
            both are asked in the same words; the tokenizers must be one.
        origin: What the directory does not say itself.

    Raises:
        CheckpointError: There is no model at `path`.
    """
    origin = origin or Origin()
    folder = resolve_checkpoint(path)
    asked_like = None if prompts_of is None else resolve_checkpoint(prompts_of)

    def load() -> ModelAnswerer:
        device = select_device(settings.device, settings.dtype)
        assembled = load_assembled(
            folder, dtype=device.dtype, device=device.torch_device, origin=origin
        )
        for note in assembled.notes:
            print(f"note: {note}", file=sys.stderr)
        if asked_like is not None:
            state = read_manifest(asked_like).encoder
            assembled.encoder = Encoder.from_state(state, assembled.encoder.tokenizer)
        return ModelAnswerer(assembled, device, settings)

    identity = _identity(folder)
    if origin != Origin():
        identity += f", standing on {origin}"
    if asked_like is not None:
        identity += f", asked like {_identity(asked_like)}"
    return System(name, label, identity, load, blind)


def systems_of(
    model: Path,
    baseline: Path | None,
    settings: GenerationSettings,
    *,
    blind: bool,
    origin: Origin,
) -> list[System]:
    """Returns a model, and a second one to compare it with, as systems.

    Args:
        model: Run, checkpoint or model directory.
        baseline: Another, or None.
        settings: How answers are made.
        blind: Ask the first without images too.
        origin: What the first directory does not say itself; its bases are the second's too, if
            that stands on any.

    Raises:
        CheckpointError: There is no model at one of the paths.
    """
    systems = [model_system("model", model, settings, label=str(model), blind=blind, origin=origin)]
    if baseline is not None:
        own = Origin(origin.bases) if stands_on_bases(baseline) else None
        systems.append(
            model_system(
                "baseline", baseline, settings, label=str(baseline), blind=False, origin=own
            )
        )
    return systems


def _identity(folder: Path) -> str:
    """Returns a digest of the directory's files: names, sizes and times of change."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(p for p in (folder, *folder.rglob("*")) if p.is_file()):
        state = file.stat()
        digest.update(f"{file.relative_to(folder)} {state.st_size} {state.st_mtime_ns}".encode())
    return f"{folder} {digest.hexdigest()[:16]}"


def plan_for(
    task: Path, settings: GenerationSettings, *, scorer: str = "auto", seed: int = 0
) -> EvaluationPlan:
    """Returns the plan of an evaluation on this machine.

    Args:
        task: The test set's file.
        settings: How answers are made.
        scorer: Name of the scorer.
        seed: Seed of the bootstrap.

    Raises:
        DeviceError: The device asked for is not there.
    """
    device = select_device(settings.device, settings.dtype)
    decided = {k: v for k, v in asdict(settings).items() if k != "batch_size"}
    decided["dtype"] = str(device.dtype).removeprefix("torch.")
    decided["device"] = device.kind
    return EvaluationPlan(
        task=task,
        scorer=scorer,
        seed=seed,
        versions=versions(),
        device=f"{device.kind}: {device.name}",
        settings=decided,
    )
