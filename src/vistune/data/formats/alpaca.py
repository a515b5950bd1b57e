r"""Alpaca's format: instruction, input, output.

    {"instruction": "Name the animal.", "input": "<image>", "output": "A cat.",
     "history": [["Hello", "Hi."]], "system": "Be brief.", "images": ["cat.jpg"]}

The question is the instruction, and the input in a line of its own where there is one. `history`
holds earlier rounds, which are learnt too. The output `<nooutput>` says that there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.json_rows import RowContent, image_names, text_of, turn_list
from vistune.data.formats.rendering import rounds, system_of
from vistune.errors import RowError
from vistune.types import Sample, Speaker

_NO_OUTPUT = "<nooutput>"


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    turns: list[tuple[Speaker, str]] = []
    system = text_of(row, "system", default="")
    if system:
        turns.append(("system", system))
    for k, pair in enumerate(turn_list(row.get("history") or [], key="history")):
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise RowError(
                f"round {k} of `history` is not a question and an answer",
                reason="bad_turn",
                got=repr(pair)[:80],
                fix="write rounds as [question, answer]",
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    question, more = text_of(row, "instruction"), text_of(row, "input", default="")
    turns.append(("user", f"{question}\n{more}" if more else question))
    answer = text_of(row, "output")
    if answer.strip() == _NO_OUTPUT:
        raise RowError(f"the output is {_NO_OUTPUT}", reason="empty_answer", fix="drop the row")
    turns.append(("assistant", answer))
    names = image_names(row.get("images"), key="images") or image_names(row.get("image"))
    return RowContent(turns=turns, images=names, id=row.get("id"))


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.
    """
    *before, (question, answer) = rounds(sample)
    row: dict[str, Any] = {
        "id": sample.id,
        "instruction": question,
        "input": "",
        "output": answer,
        "history": [list(pair) for pair in before],
        "images": list(images),
    }
    system = system_of(sample)
    return {**row, "system": system} if system else row
