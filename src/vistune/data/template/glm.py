r"""The template of VisualGLM: one image in front, rounds of questions and answers, ChatGLM's marks.

    <img> | image | </img>问：question\n答：answer\n问：question\n答： [gMASK]<sop> answer <eop>

Only the last answer is learnt, and with it `<sop>`: everything before stands in the prompt, whose
tokens all look at one another. `<img>` is plain text to the vocabulary.

Source: VisualGLM-6B's fine-tuning and chat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vistune.data.template.base import ChatTemplate, Segment, check_order, split_system
from vistune.errors import RowError
from vistune.types import Turn

_TRAINING_TIME = ("[[训练时间]]", "2023年")
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_HAN = "[\u4e00-\u9fff]"
_BESIDE_HAN = re.compile(f"(?<={_HAN})[,!:;?]|[,!:;?](?={_HAN})")


class GlmTemplate(ChatTemplate):
    """Image, rounds, `[gMASK]<sop>`, answer, `<eop>`."""

    kind: Literal["glm"] = "glm"
    """Tells this form of template from the others in a checkpoint."""
    image_open: str = "<img>"
    """In front of the image."""
    image_close: str = "</img>"
    """Behind the image."""
    question_open: str = "问："
    """In front of a question."""
    answer_cue: str = "\n答："
    """Between a question and its answer."""
    history_close: str = "\n"
    """Behind an earlier answer."""
    prompt_close: str = "[gMASK]"
    """The prompt's last token. Not learnt."""
    answer_open: str = "<sop>"
    """In front of the answer. Learnt."""
    answer_close: str = "<eop>"
    """Behind the answer. Learnt."""

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
        images = [part for turn in rest for part in turn.parts if isinstance(part, int)]
        self._check(prompt, num_images=len(images))
        out: list[Segment] = []
        if images:
            out = [_mark(self.image_open), Segment(image=images[0]), _mark(self.image_close)]
        last = len(rest) - 1
        for index, turn in enumerate(rest):
            if turn.speaker == "user":
                out += [_mark(self.question_open), *_said(turn), _mark(self.answer_cue)]
            elif index < last:
                out += [*_said(turn), _mark(self.history_close)]
        if add_generation_prompt:
            return [*out, _mark(self.prompt_close + self.answer_open)]
        if rest[last].speaker == "assistant":
            out += [_mark(self.prompt_close), _mark(self.answer_open, is_target=True)]
            out += [Segment(text=s.text, is_target=True) for s in _said(rest[last])]
            out.append(_mark(self.answer_close, is_target=True))
        return out

    def shown(self, answer: str) -> str:
        """Returns an answer as the public chat shows it.

        Blanks around it go, punctuation beside a Chinese character becomes full-width, and the
        place kept for the time of training is filled.
        """
        text = answer.strip().replace(*_TRAINING_TIME)
        return _BESIDE_HAN.sub(lambda mark: _FULL_WIDTH[mark[0]], text)

    def num_settled(self, answer: str) -> int:
        """Returns how many characters the next ones do not change; see `ChatTemplate`."""
        place, end = _TRAINING_TIME[0], len(answer)
        for size in range(min(len(place) - 1, end), 0, -1):
            if answer.endswith(place[:size]):
                end -= size
                break
        while end and answer[end - 1] in _FULL_WIDTH:
            end -= 1
        return end

    def _check(self, prompt: str | None, *, num_images: int) -> None:
        if prompt:
            raise RowError(
                f"the template '{self.name}' has no place for a system prompt",
                reason="system_not_supported",
                got=prompt[:60],
                fix="leave data.system empty and drop the system turn",
            )
        if num_images > 1:
            raise RowError(
                f"the template '{self.name}' takes one image",
                reason="too_many_images",
                got=f"{num_images} images",
                expected="at most 1",
                fix="split the row, or use a model that takes several images",
            )


def _mark(text: str, *, is_target: bool = False) -> Segment:
    return Segment(text=text, is_target=is_target, is_template=True)


def _said(turn: Turn) -> list[Segment]:
    # An image leaves the line break that stood beside it; the public prompt has none.
    has_image = any(isinstance(part, int) for part in turn.parts)
    text = turn.text.strip() if has_image else turn.text
    return [Segment(text=text)] if text else []


def visualglm_template(language: Literal["zh", "en"] = "zh") -> GlmTemplate:
    """Returns VisualGLM's template.

    Args:
        language: Which words mark questions and answers.
    """
    template = GlmTemplate(
        name=f"visualglm_{language}", stop=("<eop>",), markers=("[gMASK]", "<sop>", "<eop>")
    )
    if language == "en":
        return template.model_copy(update={"question_open": "Q:", "answer_cue": "\nA:"})
    return template
