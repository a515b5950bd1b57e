r"""Chat messages as OpenAI and the model hub write them.

    {"messages": [{"role": "user", "content": "<image>\nWho is it?"},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "Who is it?"}]}, ...]}

A content is a text or a list of parts. An image part stands where it stands; it names its file
(`image`, `path`, `url` or `image_url`; in Parquet also its bytes) or takes the next of the row's
`images`. `developer` is a system prompt. An answer with `loss: false` is refused, because every
answer of a row is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.base import IMAGE_MARK
from vistune.data.formats.json_rows import (
    RowContent,
    image_names,
    refuse_key,
    said_by,
    turn_list,
)
from vistune.data.formats.row_images import ImageName
from vistune.errors import RowError
from vistune.types import Part, Sample, Speaker


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    refuse_key(row, "tools", unless=("", [], "[]"), why="function calls")
    listed = image_names(row.get("images"), key="images") or image_names(row.get("image"))
    named: list[ImageName] = []
    turns: list[tuple[Speaker, str]] = []
    for k, message in enumerate(turn_list(row.get("messages"), key="messages")):
        if not isinstance(message, dict):
            raise _bad_turn(k, message)
        refuse_key(message, "tool_calls", unless=([],), why="function calls")
        refuse_key(message, "loss", unless=(True, 1, "true", "True"), why="an answer not learnt")
        role = message.get("role")
        speaker = said_by("system" if role == "developer" else role, turn=k)
        turns.append((speaker, _text(message.get("content"), turn=k, named=named)))
    if named and listed:
        raise RowError(
            "images are named both in the messages and in `images`",
            reason="image_count_mismatch",
            got=f"{len(named)} and {len(listed)}",
            fix="name them in one place",
        )
    return RowContent(turns=turns, images=named or listed, id=row.get("id"))


def _text(content: Any, *, turn: int, named: list[ImageName]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad_turn(turn, content)
    out = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            out += part["text"]
        elif kind in ("image", "image_url"):
            named.extend(_named(part))
            out += IMAGE_MARK
        else:
            raise _bad_turn(turn, part)
    return out


def _named(part: dict[str, Any]) -> list[ImageName]:
    for key in ("image", "path", "image_url", "url"):
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return image_names(value, key=key)
    return []


def _bad_turn(turn: int, got: Any) -> RowError:
    return RowError(
        f"turn {turn} holds neither text nor an image",
        reason="bad_turn",
        got=repr(got)[:80],
        fix='write {"type": "text", "text": ...} or {"type": "image", "image": ...}',
    )


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.
    """
    messages = [
        {"role": turn.speaker, "content": [_part(part) for part in turn.parts]}
        for turn in sample.turns
    ]
    return {"id": sample.id, "messages": messages, "images": list(images)}


def _part(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
