r"""Data-Juicer's format: text with marks for images and ends of chunks.

    {"id": "002375592", "images": ["images/00237/002375592.jpg"],
     "text": "<__dj__image>\na cat on a mat <|__dj__eoc|>"}

A caption becomes the answer to a bare image. Text with `[[human]]:` and `[[gpt]]:` is a
conversation. `<image>` is read as an image mark as well. Image paths may be absolute, as
Data-Juicer writes them, if they lie inside the image folder. Statistics are ignored. Text of
several chunks is refused: one row holds one conversation.
"""

from __future__ import annotations

import re
from typing import Any

from vistune.data.formats.base import IMAGE_MARK
from vistune.data.formats.json_rows import RowContent, image_names, said_by, text_of
from vistune.errors import RowError
from vistune.types import Speaker

_IMAGE, _END = "<__dj__image>", "<|__dj__eoc|>"
_SAID_BY = re.compile(r"\[\[(human|gpt|system)\]\]:[ \t]*")


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    images = image_names(row.get("images"), key="images")
    chunks = [chunk.strip() for chunk in text_of(row, "text").split(_END) if chunk.strip()]
    if len(chunks) != 1:
        raise RowError(
            f"the text has {len(chunks)} chunks",
            reason="several_chunks" if chunks else "empty_conversation",
            expected="one",
            fix="write one row for every chunk",
        )
    text = chunks[0].replace(_IMAGE, IMAGE_MARK)
    turns = _conversation(text) if _SAID_BY.search(text) else _caption(text)
    return RowContent(turns=turns, images=images, id=row.get("id"))


def _caption(text: str) -> list[tuple[Speaker, str]]:
    caption = text.replace(IMAGE_MARK, "").strip()
    return [("user", IMAGE_MARK * text.count(IMAGE_MARK)), ("assistant", caption)]


def _conversation(text: str) -> list[tuple[Speaker, str]]:
    lead, *rest = _SAID_BY.split(text)
    turns = [
        (said_by(role, turn=k), said.strip())
        for k, (role, said) in enumerate(zip(rest[::2], rest[1::2], strict=True))
    ]
    if lead.strip() and turns:  # images in front of the first role belong to the first question
        turns[0] = (turns[0][0], f"{lead.strip()}\n{turns[0][1]}")
    return turns
