"""What writing a row shares over the formats; each format's own `render` is beside its `interpret`.

A render function writes what its format can say and leaves out the rest. What was left out is not
declared anywhere: `data.convert` reads the row back and compares, so that nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.base import IMAGE_MARK
from vistune.types import Sample, Turn


class NotHeldError(Exception):
    """A sample that a format cannot say at all.

    Args:
        kind: Why, as a short fixed name ("several_rounds", "no_image", ...).
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def marked(turn: Turn) -> str:
    """Returns the text of a turn, `<image>` where an image stands."""
    return "".join(part if isinstance(part, str) else IMAGE_MARK for part in turn.parts)


def system_of(sample: Sample) -> str:
    """Returns the system prompt, empty when there is none."""
    first = sample.turns[0]
    return first.text if first.speaker == "system" else ""


def rounds(sample: Sample) -> list[tuple[str, str]]:
    """Returns questions and answers, `<image>` where an image stands."""
    turns = [turn for turn in sample.turns if turn.speaker != "system"]
    return [(marked(q), marked(a)) for q, a in zip(turns[::2], turns[1::2], strict=True)]


def one_round(sample: Sample) -> tuple[str, str]:
    """Returns the only question and answer.

    Raises:
        NotHeldError: There are several.
    """
    found = rounds(sample)
    if len(found) != 1:
        raise NotHeldError("several_rounds")
    return found[0]


def behind_images(question: str, *, number: int) -> str:
    """Returns a question without the images in front of it (or, elsewhere, without any)."""
    lead = f"{IMAGE_MARK}\n" * number
    return question[len(lead) :] if question.startswith(lead) else question.replace(IMAGE_MARK, "")


def one_caption(sample: Sample) -> tuple[str, str]:
    """Returns question and caption of a sample with one image.

    Raises:
        NotHeldError: It has several rounds, several images or none.
    """
    question, caption = one_round(sample)
    if len(sample.images) != 1:
        raise NotHeldError("several_images" if sample.images else "no_image")
    return behind_images(question, number=1), caption


def one_or_list(images: Sequence[Any]) -> Any:
    """Returns one image bare and several as a list."""
    return images[0] if len(images) == 1 else list(images)
