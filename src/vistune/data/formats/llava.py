r"""LLaVA's format: a JSON list or JSONL of rows with `conversations`.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is on the bus?"},
                       {"from": "gpt", "value": "An advertisement."}]}

The rules, where the public code is silent or goes wrong: `image` may be one name or a list; absent,
null, "" or [] means no image. `<image>` stays where it stands, several in a turn stay several, and
their number must be that of the images. `user`, `assistant` and `system` are known beside `human`
and `gpt`. Ids may be numbers. Other keys are ignored. See `formats.base.conversation` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.json_rows import (
    SPEAKERS,
    RowContent,
    image_names,
    said_by,
    text_of,
    turn_list,
)
from vistune.data.formats.rendering import marked, one_or_list
from vistune.types import Sample, Speaker, Turn


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    images = image_names(row.get("image"))
    return RowContent(turns=from_value_turns(row), images=images, id=row.get("id"))


def from_value_turns(row: dict[str, Any]) -> list[tuple[Speaker, str]]:
    """Returns who says what under `conversations`, written as `from` and `value`."""
    turns = turn_list(row.get("conversations"), key="conversations")
    try:
        said = [(SPEAKERS[turn["from"]], turn["value"]) for turn in turns]
    except (KeyError, TypeError):
        said = []  # something is wrong with one of them
    if len(said) == len(turns) and all(type(text) is str for _, text in said):
        return said
    out: list[tuple[Speaker, str]] = []
    for k, turn in enumerate(turns):
        text = text_of(turn, "value", turn=k)
        out.append((said_by(turn.get("from"), turn=k), text))
    return out


_ROLES: dict[Speaker, str] = {"user": "human", "assistant": "gpt", "system": "system"}


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.
    """
    row: dict[str, Any] = {"id": sample.id}
    if images:
        row["image"] = one_or_list(images)
    return {**row, "conversations": to_value_turns(sample.turns)}


def to_value_turns(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Returns turns as `from` and `value`."""
    return [{"from": _ROLES[turn.speaker], "value": marked(turn)} for turn in turns]
