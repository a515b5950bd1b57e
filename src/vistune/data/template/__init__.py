"""Chat templates as data: ids and loss mask come from one rendering."""

from __future__ import annotations

from typing import Any

from vistune.data.template.base import ChatTemplate, Segment
from vistune.data.template.jinja import JinjaTemplate, template_of
from vistune.data.template.pieces import PieceTemplate
from vistune.data.template.table import TEMPLATES

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "JinjaTemplate",
    "PieceTemplate",
    "Segment",
    "load_template",
    "resolve_template",
    "template_of",
]


def resolve_template(name: str, tokenizer: Any) -> ChatTemplate:
    """Returns the template a recipe names.

    Args:
        name: A name of `TEMPLATES`, or `tokenizer` or `auto` for the tokenizer's own.
        tokenizer: A transformers tokenizer.

    Raises:
        RegistryError: No template has that name.
        TemplateError: The tokenizer has no template of its own.
    """
    if name in ("auto", "tokenizer"):
        return template_of(tokenizer)
    return TEMPLATES.get(name)


def load_template(state: dict[str, Any]) -> ChatTemplate:
    """Returns the template that `ChatTemplate.model_dump` wrote into a checkpoint."""
    kinds: dict[str, type[ChatTemplate]] = {"pieces": PieceTemplate, "jinja": JinjaTemplate}
    return kinds[state["kind"]].model_validate(state)
