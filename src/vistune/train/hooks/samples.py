"""Answers to fixed questions while training, to watch the model learn.

Asking changes nothing: answers are greedy, random states and the training mode of every module are
put back, so a run with and without sample answers ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vistune.train.failures import out_of_memory_explained
from vistune.train.hooks.base import Hook
from vistune.train.hooks.tensorboard import TensorBoardHook
from vistune.train.state import random_state, set_random_state


@dataclass(frozen=True)
class Answer:
    """One question and what the model says to it.

    Args:
        question: The question.
        image: The image file as the recipe names it, or None.
        text: The answer.
    """

    question: str
    image: str | None
    text: str


class SampleAnswersHook(Hook):
    """Asks before the first step, every `every_steps` steps and after the last step.

    Args:
        ask: Asks the model in its present state.
        model: The model.
        folder: Directory of the text files.
        every_steps: Steps between answers, or None for the first and last only.
        tensorboard: Where the answers go too, or None.
        device: The model's device.
    """

    def __init__(
        self,
        ask: Callable[[], Sequence[Answer]],
        *,
        model: nn.Module,
        folder: Path,
        every_steps: int | None,
        tensorboard: TensorBoardHook | None,
        device: torch.device,
    ) -> None:
        self._ask = ask
        self._model = model
        self._folder = folder
        self._every_steps = every_steps
        self._tensorboard = tensorboard
        self._device = device

    def on_start(self, step: int) -> None:
        """Asks the untrained model; a resumed run has asked it before."""
        if step == 0:
            self._write(step)

    def on_step(self, step: int, *, last: bool) -> None:
        """Asks when it is time."""
        if last or (self._every_steps is not None and step % self._every_steps == 0):
            self._write(step)

    def _write(self, step: int) -> None:
        with (
            undisturbed(self._model, self._device),
            out_of_memory_explained(
                what="while answering sample questions",
                where=str(self._device),
                fix=lambda: (
                    "lower sample.max_new_tokens, or ask fewer sample.prompts of fewer"
                    " sample.images"
                ),
            ),
        ):
            answers = self._ask()
        self._folder.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(
            ("" if a.image is None else f"image:    {a.image}\n")
            + f"question: {a.question}\nanswer:   {a.text}"
            for a in answers
        )
        path = self._folder / f"step_{step:08d}.txt"
        path.write_text(text + "\n", encoding="utf-8")
        if self._tensorboard is not None:
            # TensorBoard renders Markdown; four spaces keep the text as it is.
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self._tensorboard.text("samples", indented, step=step)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts the model in evaluation mode without gradients, and everything back afterwards."""
    training = {module: module.training for module in model.modules()}
    state = random_state(device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        set_random_state(state, device)
