r"""Data-Juicer's format: text with marks for images and ends of chunks.

    {"id": "002375592", "images": ["images/00237/002375592.jpg"],
     "text": "<__dj__image>\na cat on a mat <|__dj__eoc|>"}

A caption becomes the answer to a bare image. `<image>` is read as an image mark as well. Image
paths may be absolute, as Data-Juicer writes them, if they lie inside the image folder. Statistics
are ignored. Text of several chunks is one document, the n-th mark standing for the n-th image:

- Text with `[[human]]:` and `[[gpt]]:` is a conversation; a chunk is a part of it.
- Otherwise every chunk with images is a round: its images are asked, its text is answered. A chunk
  without images is one more paragraph of the answer before it; images without text belong to the
  next chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vistune.data.formats.base import IMAGE_MARK
from vistune.data.formats.json_rows import RowContent, image_names, said_by, text_of
from vistune.data.formats.rendering import NotHeldError, marked
from vistune.errors import RowError
from vistune.types import Sample, Speaker

_IMAGE, _END = "<__dj__image>", "<|__dj__eoc|>"
_SAID_BY = re.compile(r"\[\[(human|gpt|system)\]\]:[ \t]*")


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    images = image_names(row.get("images"), key="images")
    text = text_of(row, "text").replace(_IMAGE, IMAGE_MARK)
    chunks = [chunk.strip() for chunk in text.split(_END) if chunk.strip()]
    if not chunks:
        raise RowError("the text is empty", reason="empty_conversation", fix="drop the row")
    whole = "\n".join(chunks)
    turns = _conversation(whole) if _SAID_BY.search(whole) else _document(chunks)
    return RowContent(turns=turns, images=images, id=row.get("id"))


def _document(chunks: Sequence[str]) -> list[tuple[Speaker, str]]:
    turns: list[tuple[Speaker, str]] = []
    waiting = 0  # images that no text has followed yet
    for chunk in chunks:
        waiting += chunk.count(IMAGE_MARK)
        text = chunk.replace(IMAGE_MARK, "").strip()
        if text and turns and not waiting:
            turns[-1] = ("assistant", f"{turns[-1][1]}\n\n{text}")
        elif text:
            turns += [("user", IMAGE_MARK * waiting), ("assistant", text)]
            waiting = 0
    if waiting:
        turns += [("user", IMAGE_MARK * waiting), ("assistant", "")]
    return turns


def _conversation(text: str) -> list[tuple[Speaker, str]]:
    lead, *rest = _SAID_BY.split(text)
    turns = [
        (said_by(role, turn=k), said.strip())
        for k, (role, said) in enumerate(zip(rest[::2], rest[1::2], strict=True))
    ]
    if lead.strip() and turns:  # images in front of the first role belong to the first question
        turns[0] = (turns[0][0], f"{lead.strip()}\n{turns[0][1]}")
    return turns


_ROLES: dict[Speaker, str] = {"user": "human", "assistant": "gpt", "system": "system"}


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.

    Raises:
        NotHeldError: The format cannot say it.
    """
    said = [(turn.speaker, marked(turn)) for turn in sample.turns]
    if any(mark in text for _, text in said for mark in (_IMAGE, _END)) or any(
        _SAID_BY.search(text) for _, text in said
    ):
        raise NotHeldError("mark_in_text")
    if len(said) == 2 and not said[0][1].replace(IMAGE_MARK, ""):
        text = f"{said[0][1]}\n{said[1][1]}"
    else:
        text = "\n".join(f"[[{_ROLES[speaker]}]]: {text}" for speaker, text in said)
    text = text.replace(IMAGE_MARK, _IMAGE)
    return {"id": sample.id, "images": list(images), "text": f"{text} {_END}"}
