r"""XTuner's format: `conversation` as pairs of input and output.

    {"conversation": [{"system": "Be brief.", "input": "<image>\nWho is it?", "output": "A cat."},
                      {"input": "Sure?", "output": "Yes."}], "image": "cat.jpg"}

`system` may stand in the first pair. `output_with_loss: false`, `need_eos_token: false` and `sep`
are refused: every answer is learnt, and how it ends is the template's. So is an empty input: text
without a question is no conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.json_rows import (
    RowContent,
    image_names,
    refuse_key,
    text_of,
    turn_list,
)
from vistune.data.formats.rendering import one_or_list, rounds, system_of
from vistune.errors import RowError
from vistune.types import Sample, Speaker


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


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.
    """
    pairs = [{"input": question, "output": answer} for question, answer in rounds(sample)]
    system = system_of(sample)
    if system:
        pairs[0] = {"system": system, **pairs[0]}
    row: dict[str, Any] = {"id": sample.id}
    if images:
        row["image"] = one_or_list(images)
    return {**row, "conversation": pairs}
