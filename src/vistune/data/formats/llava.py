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

from typing import Any

from vistune.data.formats.json_rows import RowContent, image_names, said_by, text_of, turn_list
from vistune.types import Speaker


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    images = image_names(row.get("image"))
    return RowContent(turns=from_value_turns(row), images=images, id=row.get("id"))


def from_value_turns(row: dict[str, Any]) -> list[tuple[Speaker, str]]:
    """Returns who says what under `conversations`, written as `from` and `value`."""
    out: list[tuple[Speaker, str]] = []
    for k, turn in enumerate(turn_list(row.get("conversations"), key="conversations")):
        text = text_of(turn, "value", turn=k)
        out.append((said_by(turn.get("from"), turn=k), text))
    return out
