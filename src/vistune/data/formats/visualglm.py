r"""VisualGLM's format: one image, one prompt, one label.

    {"img": "fewshot-data/2p.png", "prompt": "这张图片的背景里有什么内容？", "label": "..."}

The image stands in front of the prompt. A row without `img` is text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vistune.data.formats.json_rows import RowContent, image_first, image_names, text_of
from vistune.data.formats.rendering import behind_images, one_or_list, one_round
from vistune.types import Sample


def interpret(row: dict[str, Any]) -> RowContent:
    """Returns what a row means. See the module for the rules."""
    images = image_names(row.get("img"), key="img")
    prompt = text_of(row, "prompt")
    return RowContent(
        turns=[
            ("user", image_first(prompt, number=len(images))),
            ("assistant", text_of(row, "label")),
        ],
        images=images,
        id=row.get("id"),
    )


def render(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a sample as a row of this format.

    Args:
        sample: The sample.
        images: What stands for its images, in order.

    Raises:
        NotHeldError: The format cannot say it.
    """
    question, answer = one_round(sample)
    row: dict[str, Any] = {"id": sample.id}
    if images:
        row["img"] = one_or_list(images)
    return {**row, "prompt": behind_images(question, number=len(images)), "label": answer}
