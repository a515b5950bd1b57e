r"""ShareGPT's format as fine-tuning tools use it: LLaVA's turns, images under `images`.

    {"conversations": [{"from": "human", "value": "<image>\nWho is it?"},
                       {"from": "gpt", "value": "A cat."}],
     "images": ["cat.jpg"], "system": "Be brief."}

`system` is a text beside the turns. `image` is read too. Rows that come with `tools` are refused:
calls of functions are not trained.
"""

from __future__ import annotations

from typing import Any

from vistune.data.formats.json_rows import RowContent, image_names, refuse_key, text_of
from vistune.data.formats.llava import from_value_turns


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    refuse_key(row, "tools", unless=("", [], "[]"), why="function calls")
    turns = from_value_turns(row)
    system = text_of(row, "system", default="")
    if system:
        turns.insert(0, ("system", system))
    names = image_names(row.get("images"), key="images") or image_names(row.get("image"))
    return RowContent(turns=turns, images=names, id=row.get("id"))
