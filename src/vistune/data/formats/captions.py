"""What formats of image and caption share: the question that a caption answers."""

from __future__ import annotations

from vistune.data.formats.base import IMAGE_MARK, conversation
from vistune.data.formats.json_rows import image_first
from vistune.errors import RowError
from vistune.types import Turn

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
"""What a caption answers where a row asks nothing itself: as LLaVA's mix asks for captions."""


def captioned(
    caption: str, *, question: str = CAPTION_QUESTION
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Returns turns and notes of an image, a question and a caption.

    Args:
        caption: The answer.
        question: The question; the image stands in front of it.

    Raises:
        RowError: The caption is blank, or a text holds the image mark.
    """
    if IMAGE_MARK in question:
        raise RowError(
            f"{IMAGE_MARK} stands in the question",
            reason="image_count_mismatch",
            fix=f"take {IMAGE_MARK} out of it: the image is put in front",
        )
    return conversation([("user", image_first(question)), ("assistant", caption)], num_images=1)
