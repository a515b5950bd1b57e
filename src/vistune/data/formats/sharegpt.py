r"""ShareGPT's format as fine-tuning tools use it: LLaVA's turns, images under `images`.

    {"conversations": [{"from": "human", "value": "<image>\nWho is it?"},
                       {"from": "gpt", "value": "A cat."}],
     "images": ["cat.jpg"], "system": "Be brief."}

`system` is a text beside the turns. `image` is read too. Rows that come with `tools` are refused:
calls of functions are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.json_rows import RowContent, image_names, refuse_key, text_of
from vistune.data.formats.llava import from_value_turns, to_value_turns
from vistune.data.formats.rendering import system_of
from vistune.types import Sample


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    refuse_key(row, "tools", unless=("", [], "[]"), why="function calls")
    turns = from_value_turns(row)
    system = text_of(row, "system", default="")
    if system:
        turns.insert(0, ("system", system))
    names = image_names(row.get("images"), key="images") or image_names(row.get("image"))
    return RowContent(turns=turns, images=names, id=row.get("id"))


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.
    """
    turns = [turn for turn in sample.turns if turn.speaker != "system"]
    row = {"id": sample.id, "conversations": to_value_turns(turns), "images": list(images)}
    system = system_of(sample)
    return {**row, "system": system} if system else row
