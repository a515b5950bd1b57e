r"""XTuner's format: `conversation` as pairs of input and output.

    {"conversation": [{"system": "Be brief.", "input": "<image>\nWho is it?", "output": "A cat."},
                      {"input": "Sure?", "output": "Yes."}], "image": "cat.jpg"}

`system` may stand in the first pair. `output_with_loss: false`, `need_eos_token: false` and `sep`
are refused: every answer is learnt, and how it ends is the template's. So is an empty input: text
without a question is no conversation.
"""

from __future__ import annotations

from typing import Any

from vistune.data.formats.json_rows import (
    RowContent,
    image_names,
    refuse_key,
    text_of,
    turn_list,
)
from vistune.errors import RowError
from vistune.types import Speaker


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    turns: list[tuple[Speaker, str]] = []
    for k, pair in enumerate(turn_list(row.get("conversation"), key="conversation")):
        question, answer = text_of(pair, "input", turn=k), text_of(pair, "output", turn=k)
        refuse_key(pair, "output_with_loss", unless=(True,), why="an answer that is not learnt")
        refuse_key(pair, "need_eos_token", unless=(True,), why="an answer without an end")
        refuse_key(pair, "sep", unless=("", "\n"), why="another end of the round")
        if not question:
            raise RowError(
                f"pair {k} has an empty input",
                reason="empty_question",
                fix="write a question, or drop the row",
            )
        system = text_of(pair, "system", turn=k, default="")
        if system:
            turns.append(("system", system))
        turns += [("user", question), ("assistant", answer)]
    return RowContent(turns=turns, images=image_names(row.get("image")), id=row.get("id"))
