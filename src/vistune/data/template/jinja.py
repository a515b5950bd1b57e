"""The tokenizer's own chat template (jinja), with an exact loss mask.

The template is rendered twice: once as it is, and once with every answer replaced by a mark that
cannot occur in text. Putting the answers back at their marks must give the first rendering again,
character for character; then it is known where every answer stands. A template that changes an
answer (trims it, cuts something out of it) or leaves one out is refused for that row, by name,
instead of being masked by guesswork. `{% generation %}` blocks, where a template has them, say
what is learnt and are followed; a special token right behind one, which ends the answer, is learnt
too.

This module renders with jinja2 in its sandbox and does not need transformers.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from vistune.data.template.base import ChatTemplate, Segment, check_order, split_system
from vistune.errors import RowError, TemplateError
from vistune.types import Turn

# Private-use characters: no tokenizer vocabulary and no template speaks of them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_IMAGE = re.compile(f"{_OPEN}i([0-9]+){_CLOSE}")
_BLOCK_OPEN, _BLOCK_CLOSE = "\ue0f2", "\ue0f3"
_NO_END = "no special token ends an answer, so the model could not learn to stop"
_IMAGE_TEXT = "<image>"
"""What templates for LLaVA write where a message has an image part."""
_FORBIDDEN = re.compile("[\ue0f0-\ue0f3]")


class JinjaTemplate(ChatTemplate):
    """A jinja chat template, as tokenizers carry them."""

    kind: Literal["jinja"] = "jinja"
    """Tells this form of template from the others in a checkpoint."""
    source: str
    """The jinja text."""
    variables: dict[str, str] = {}
    """Special tokens by the names the template may use (`bos_token`, ...)."""
    special_tokens: tuple[str, ...] = ()
    """Every special token of the tokenizer; the first one behind an answer ends it."""
    add_bos: bool = False
    """What the tokenizer puts in front of a text stands there; off where the template writes the
    begin-of-text itself."""
    image_text: str = ""
    """What the template writes where a message has an image part; empty for a template of text
    alone, where images stand in the text."""
    image_open: str = ""
    """Text put in front of an image's tokens, to be tokenised with what stands before it; `{n}` in
    it is the number of the image in the conversation, from 0."""
    image_close: str = ""
    """Text put behind them."""
    closing: str = ""
    """Special token put behind the last answer, where the template ends an answer only by what
    opens the next turn (GLM)."""

    def segments(
        self,
        turns: Sequence[Turn],
        system: str | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> list[Segment]:
        """Renders a conversation. See `ChatTemplate.segments`."""
        prompt, rest = split_system(turns, system, None)
        check_order(rest)
        messages = [] if not prompt else [{"role": "system", "content": prompt}]
        messages += [{"role": turn.speaker, "content": _content(turn)} for turn in rest]
        for message in messages:
            if self.image_text and self.image_text in message["content"]:
                raise RowError(
                    "the text spells what stands for an image",
                    reason="image_token_in_text",
                    got=self.image_text,
                    fix="take it out of the text",
                )
            if _FORBIDDEN.search(_IMAGE.sub("", message["content"])):
                raise RowError(
                    "the text holds a private-use character (U+E0F0 to U+E0F3)",
                    reason="reserved_character",
                    fix="remove the character",
                )
        if "generation" in _tags(self.source):
            return self._from_blocks(messages, add_generation_prompt)
        return self._from_marks(messages, add_generation_prompt)

    def writes_bos(self) -> bool:
        """Whether what it writes begins with the begin-of-text."""
        bos = self.variables.get("bos_token")
        try:
            text = self._render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        except RowError:
            return True  # rows will be refused for the same reason, by name
        return bool(bos) and text.startswith(str(bos))

    def _from_blocks(
        self, messages: list[dict[str, str]], add_generation_prompt: bool
    ) -> list[Segment]:
        text = self._render(messages, add_generation_prompt=add_generation_prompt)
        pieces = re.split(f"[{_BLOCK_OPEN}{_BLOCK_CLOSE}]", text)
        # Some blocks stop short of the token that ends the answer, and without it the model would
        # not learn to stop.
        for index in range(1, len(pieces), 2):
            end = self._missing_end(pieces[index], pieces[index + 1])
            pieces[index] += end
            pieces[index + 1] = pieces[index + 1].removeprefix(end)
            if not add_generation_prompt and not any(
                t in pieces[index] for t in self.special_tokens
            ):
                self._refuse(_NO_END)
        out: list[Segment] = []
        for index, piece in enumerate(pieces):
            _emit(out, piece, is_target=index % 2 == 1)
        return out

    def _missing_end(self, block: str, behind: str) -> str:
        """Returns the special token right behind a block that does not end with one, if any."""
        if block.endswith(self.special_tokens):
            return ""
        return max((t for t in self.special_tokens if behind.startswith(t)), key=len, default="")

    def _from_marks(
        self, messages: list[dict[str, str]], add_generation_prompt: bool
    ) -> list[Segment]:
        plain = self._render(messages, add_generation_prompt=add_generation_prompt)
        marks = {i: f"{_OPEN}a{i}{_CLOSE}" for i, m in enumerate(messages) if _is_answer(m)}
        marked = self._render(
            [{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(messages)],
            add_generation_prompt=add_generation_prompt,
        )
        spans: list[tuple[int, int]] = []
        here, there = 0, 0  # as far as `plain` and `marked` have been matched
        for i, mark in marks.items():
            at = marked.find(mark, there)
            if at < 0 or marked.count(mark) != 1:
                self._refuse(f"message {i} is shown {marked.count(mark)} times, or out of order")
            lead, content = marked[there:at], messages[i]["content"]
            if not plain.startswith(lead + content, here):
                self._refuse(f"the text of message {i} is changed, or that around it")
            start = here + len(lead)
            here, there = start + len(content), at + len(mark)
            following = marked.find(f"{_OPEN}a", there)
            tail = marked[there : len(marked) if following < 0 else following]
            if not tail:
                plain, marked, tail = plain + self.closing, marked + self.closing, self.closing
            spans.append((self._start(messages[:i], plain, start), here + self._end(tail)))
        if marked[there:] != plain[here:]:
            self._refuse("the text behind an answer is changed")
        return _cut(plain, spans)

    def _start(self, before: list[dict[str, str]], plain: str, position: int) -> int:
        # What is learnt begins where a generation prompt would end: the model has to say all that
        # follows it, which may start before the answer's own text (with a space, for one).
        cue = self._render(before, add_generation_prompt=True)
        return len(cue) if len(cue) <= position and plain.startswith(cue) else position

    def _end(self, tail: str) -> int:
        # Of what follows an answer, the text up to and with the first special token is learnt.
        ends = [tail.find(token) + len(token) for token in self.special_tokens if token in tail]
        if not ends or _IMAGE.search(tail[: min(ends)]):
            self._refuse(_NO_END)
        return min(ends)

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        images = [number for m in messages for number in _IMAGE.findall(m["content"])]
        given: Sequence[dict[str, Any]] = messages
        if self.image_text:
            given = [{**m, "content": _parts(m["content"])} for m in messages]
        try:
            text = _compiled(self.source).render(
                messages=given, add_generation_prompt=add_generation_prompt, **self.variables
            )
        except jinja2.TemplateError as error:
            raise RowError(
                f"the tokenizer's chat template refuses the conversation: {error}",
                reason="template_refused",
                fix="choose a named data.template, or mend the row",
            ) from error
        return self._marked(text, images) if self.image_text else text

    def _marked(self, text: str, images: Sequence[str]) -> str:
        # The template wrote the same text for every image; which one it is, their order says.
        pieces = text.split(self.image_text)
        if len(pieces) != len(images) + 1:
            self._refuse(f"it shows {len(pieces) - 1} images of {len(images)}")
        marks = [
            f"{self.image_open.replace('{n}', str(n))}{_OPEN}i{i}{_CLOSE}{self.image_close}"
            for n, i in enumerate(images)
        ]
        return "".join(itertools.chain(*zip(pieces, marks, strict=False), pieces[-1:]))

    def _refuse(self, why: str) -> NoReturn:
        raise RowError(
            f"the tokenizer's chat template does not allow an exact loss mask: {why}",
            reason="template_inexact",
            fix="choose a named data.template, or add {% generation %} to the tokenizer's",
        )


def template_of(
    tokenizer: Any, *, image_text: str = "", image_open: str = "", image_close: str = ""
) -> JinjaTemplate:
    """Returns the chat template a tokenizer carries.

    Args:
        tokenizer: A transformers tokenizer.
        image_text: What the template writes for an image part; empty where it knows none.
        image_open: Text to put in front of an image's tokens.
        image_close: Text to put behind them.

    Raises:
        TemplateError: It has none, or one that cannot be parsed.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise TemplateError(
            "the tokenizer has no chat template of its own",
            where="data.template",
            got="tokenizer",
            fix="name one: data.template=vicuna_v1 (or plain, chatml, ...)",
        )
    try:
        _compiled(source)
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"the tokenizer's chat template cannot be parsed: {error}", where="data.template"
        ) from error
    variables = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    specials = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    specials.update(tokenizer.all_special_tokens)
    template = JinjaTemplate(
        name="tokenizer",
        source=source,
        variables=variables,
        special_tokens=tuple(sorted(token for token in specials if token)),
        image_text=image_text,
        image_open=image_open,
        image_close=image_close,
    )
    template = _taking_parts(template)
    ends = _ends(template, (Turn("user", ("Hi",)), Turn("assistant", ("Hello",))))
    if not ends:
        rounds = (Turn("user", ("Hi",)), Turn("assistant", ("Hello",)), Turn("user", ("So?",)))
        ends = _ends(template, rounds)
        template = template.model_copy(update={"closing": ends[0] if ends else ""})
    stop = [*ends, *([tokenizer.eos_token] if tokenizer.eos_token else [])]
    return template.model_copy(update={"stop": tuple(dict.fromkeys(stop))})


def _taking_parts(template: JinjaTemplate) -> JinjaTemplate:
    """Returns a template with its messages in the form it takes: texts, or lists of typed parts.

    Templates of processors loop over parts, and write nothing at all where a text stands.

    Raises:
        TemplateError: It shows the text of a message in neither form.
    """
    if template.image_text or _shows(template, "Hi"):
        return template
    with_parts = template.model_copy(update={"image_text": _IMAGE_TEXT})
    if not _shows(with_parts, "Hi", f"{_OPEN}i0{_CLOSE}"):
        raise TemplateError(
            "the tokenizer's chat template leaves out what a person says",
            where="data.template",
            got=template.source[:200],
            fix="name one: data.template=vicuna_v1 (or plain, chatml, ...)",
        )
    return with_parts


def _shows(template: JinjaTemplate, *texts: str) -> bool:
    message = {"role": "user", "content": "".join(texts)}
    try:
        shown = template._render([message], add_generation_prompt=True)
    except RowError:
        return not template.image_text  # rows will be refused for the same reason, by name
    return all(text in shown for text in texts)


def _ends(template: JinjaTemplate, turns: Sequence[Turn]) -> list[str]:
    # What ends an answer is often not the tokenizer's end of text (Llama-3: <|eot_id|>).
    try:
        segments = template.segments(turns)
    except RowError:
        return []  # rows will be refused for the same reason, by name
    said = "".join(segment.text for segment in segments if segment.is_target)
    return [token for token in template.special_tokens if said.endswith(token)]


def _is_answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant"


def _content(turn: Turn) -> str:
    return "".join(p if isinstance(p, str) else f"{_OPEN}i{p}{_CLOSE}" for p in turn.parts)


def _parts(content: str) -> list[dict[str, str]]:
    """Returns a message's content as transformers' processors take it: a list of typed parts."""
    pieces = enumerate(_IMAGE.split(content))
    parts = [{"type": "image"} if i % 2 else {"type": "text", "text": t} for i, t in pieces]
    return [part for part in parts if part.get("text") != ""]


def _cut(text: str, spans: list[tuple[int, int]]) -> list[Segment]:
    out: list[Segment] = []
    end = 0
    for start, stop in spans:
        _emit(out, text[end:start], is_target=False)
        _emit(out, text[start:stop], is_target=True)
        end = stop
    _emit(out, text[end:], is_target=False)
    return out


def _emit(out: list[Segment], text: str, *, is_target: bool) -> None:
    for index, piece in enumerate(_IMAGE.split(text)):
        if index % 2 == 1:
            out.append(Segment(image=int(piece)))
        elif piece:
            out.append(Segment(text=piece, is_target=is_target))


def _tags(source: str) -> set[str]:
    return set(re.findall(r"\{%-?\s*(\w+)", source))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the model is to say."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{_BLOCK_OPEN}{caller()}{_BLOCK_CLOSE}"


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    # `strftime_now` stays undefined on purpose: a template that writes today's date would train on
    # other text than it answers with tomorrow.
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
