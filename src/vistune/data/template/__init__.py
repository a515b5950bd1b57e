"""Chat templates as data: ids and loss mask come from one rendering."""

from __future__ import annotations

from typing import Any

from vistune.data.template.base import ChatTemplate, Segment, Stretch
from vistune.data.template.glm import GlmTemplate
from vistune.data.template.jinja import JinjaTemplate, template_of
from vistune.data.template.pieces import PieceTemplate
from vistune.data.template.prefix import PrefixTemplate
from vistune.data.template.question import QuestionTemplate
from vistune.data.template.table import TEMPLATES
from vistune.errors import TemplateError

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "GlmTemplate",
    "JinjaTemplate",
    "PieceTemplate",
    "PrefixTemplate",
    "QuestionTemplate",
    "Segment",
    "Stretch",
    "load_template",
    "resolve_template",
    "template_of",
]

_KINDS: dict[str, type[ChatTemplate]] = {
    "pieces": PieceTemplate,
    "jinja": JinjaTemplate,
    "question": QuestionTemplate,
    "glm": GlmTemplate,
    "prefix": PrefixTemplate,
}


def resolve_template(
    name: str,
    tokenizer: Any,
    *,
    image_marks: tuple[str, str, str] | None = None,
    adds_bos: bool = False,
) -> ChatTemplate:
    """Returns the template a recipe names.

    Args:
        name: A name of `TEMPLATES`, or `tokenizer` or `auto` for the tokenizer's own.
        tokenizer: A transformers tokenizer.
        image_marks: What its own template writes for an image part, and what is put in front of
            and behind an image's tokens in its stead; None for a template of text alone.
        adds_bos: Whether the tokenizer's own leading tokens go in front of its own template, where
            that does not write them.

    Raises:
        RegistryError: No template has that name.
        TemplateError: The tokenizer has no template of its own.
    """
    if name in ("auto", "tokenizer"):
        text, before, behind = image_marks or ("", "", "")
        own = template_of(tokenizer, image_text=text, image_open=before, image_close=behind)
        return own.model_copy(update={"add_bos": adds_bos and not own.writes_bos()})
    return TEMPLATES.get(name)


def load_template(state: dict[str, Any]) -> ChatTemplate:
    """Returns the template that `ChatTemplate.model_dump` wrote into a checkpoint.

    Raises:
        TemplateError: It is of no known kind.
    """
    kind = state.get("kind")
    if kind not in _KINDS:
        raise TemplateError(
            "the template in the checkpoint is of a kind that is not known",
            got=kind,
            expected=", ".join(_KINDS),
            fix="read the checkpoint with the version of vistune that wrote it, or a later one",
        )
    return _KINDS[kind].model_validate(state)
