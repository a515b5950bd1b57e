"""A chat template as jinja, for programs that know templates only in that form.

Messages may hold text, or a list of parts (`{"type": "image"}`, `{"type": "text", ...}`).
"""

from __future__ import annotations

import json

from vistune.data.encode import Encoder
from vistune.data.template.base import ChatTemplate
from vistune.data.template.jinja import JinjaTemplate
from vistune.data.template.pieces import PieceTemplate
from vistune.errors import TemplateError
from vistune.models.facts import IMAGE_TOKEN

_SAY = """\
{%- macro say(message, only_images) -%}
{%- if message['content'] is string -%}
{%- if not only_images -%}{{ message['content'] }}{%- endif -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ @IMAGE@ }}
{%- elif part['type'] == 'text' and not only_images -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set one = [{'role': message['role'], 'content': say(message, false)}] -%}
{%- set flat.messages = flat.messages + one -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def chat_template(encoder: Encoder, *, image_text: str = IMAGE_TOKEN) -> str:
    """Returns an encoder's template and system prompt as jinja.

    Args:
        encoder: The encoder.
        image_text: What is written for an image part; the processor puts its tokens there.

    Raises:
        TemplateError: The template is of a kind that has no jinja form.
    """
    template: ChatTemplate = encoder.template
    say = _SAY.replace("@IMAGE@", _literal(image_text))
    if type(template) is PieceTemplate:  # a subclass may write something else
        return say + _pieces(template, encoder.system)
    if isinstance(template, JinjaTemplate) and template.image_text:
        # It takes typed parts itself.
        return _system_message(encoder.system, as_parts=True) + template.source
    if isinstance(template, JinjaTemplate):
        return say + _FLATTEN + _system_message(encoder.system) + template.source
    raise TemplateError(
        f"the template '{template.name}' cannot be written as jinja",
        fix="export with --to vistune",
    )


def _literal(text: str) -> str:
    """A jinja string literal; its escapes are those of JSON."""
    return json.dumps(text)


def _system_message(system: str | None, *, as_parts: bool = False) -> str:
    if not system:
        return ""
    content = _literal(system)
    if as_parts:
        content = f"[{{'type': 'text', 'text': {content}}}]"
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {content}}}] + messages -%}}"
        "{%- endif -%}\n"
    )


def _pieces(template: PieceTemplate, system: str | None) -> str:
    default = template.system_default if system is None else system
    only_images = "true" if template.caption_only else "false"
    again = template.user_open if template.user_reopen is None else template.user_reopen
    closing = "true" if template.close_empty else "said"
    mark = f"{{{{- {_literal(template.user_mark)} -}}}}\n" if template.user_mark else ""
    closed = f"{{%- else -%}}\n{{{{- {_literal(template.end)} -}}}}\n" if template.end else ""
    before = "" if template.system_in_user else "{{- block -}}\n"
    inside = "{%- if loop.first -%}{{ block }}{%- endif -%}\n" if template.system_in_user else ""
    return (
        f"{{%- set system = {_literal(default or '')} -%}}\n"
        "{%- if messages[0]['role'] == 'system' -%}\n"
        "{%- set system = say(messages[0], false) -%}\n"
        "{%- set messages = messages[1:] -%}\n"
        "{%- endif -%}\n"
        f"{{%- set block = {_literal(template.system_open)} + system +"
        f" {_literal(template.system_close)} if system else '' -%}}\n"
        f"{before}"
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        f"{mark}"
        f"{{{{- {_literal(template.user_open)} if loop.first else {_literal(again)} -}}}}\n"
        f"{inside}"
        f"{{{{- say(message, {only_images}) -}}}}\n"
        f"{{{{- {_literal(template.user_close)} -}}}}\n"
        "{%- else -%}\n"
        "{%- set said = say(message, false) -%}\n"
        f"{{{{- {_literal(template.answer_cue)} -}}}}\n"
        f"{{%- if {closing} -%}}\n"
        f"{{{{- {_literal(template.answer_open)} + said + {_literal(template.answer_close)} +"
        f" {_literal(template.answer_gap)} -}}}}\n"
        "{%- endif -%}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        f"{{{{- {_literal(template.answer_cue)} -}}}}\n"
        f"{closed}"
        "{%- endif -%}\n"
    )
