r"""VisualGLM's format: one image, one prompt, one label.

    {"img": "fewshot-data/2p.png", "prompt": "这张图片的背景里有什么内容？", "label": "..."}

The image stands in front of the prompt. A row without `img` is text only.
"""

from __future__ import annotations

from typing import Any

from vistune.data.formats.json_rows import RowContent, image_first, image_names, text_of


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
