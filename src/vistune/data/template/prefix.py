"""The prompt form of PaliGemma: images, begin of text, one line of prompt; then the answer.

There are no roles and no history: the prompt is read both ways as a prefix, the answer is what
follows it, and what can be asked is one thing.

Source: transformers' `PaliGemmaProcessor` with `suffix`. One difference: there prompt and answer
are tokenised apart, here as one text, so an answer that begins with a line break may share a token
with the one that ends the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vistune.data.template.base import ChatTemplate, Segment, check_order, split_system
from vistune.errors import RowError
from vistune.types import Turn


class PrefixTemplate(ChatTemplate):
    """Images, then begin of text, a prompt and a line break, then an answer and end of text."""

    kind: Literal["prefix"] = "prefix"
    """Tells this form of template from the others in a checkpoint."""
    add_bos: bool = False
    """The begin of text stands behind the images, and the template writes it."""
    both_ways: bool = True
    """The prompt is a prefix that sees all of itself."""
    prompt_open: str = "<bos>"
    """In front of a prompt, behind its images."""
    prompt_close: str = "\n"
    """Behind a prompt. Not learnt."""
    answer_close: str = "<eos>"
    """Behind an answer. Learnt."""

    def segments(
        self,
        turns: Sequence[Turn],
        system: str | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> list[Segment]:
        """Renders a prompt and its answer. See `ChatTemplate.segments`."""
        prompt, rest = split_system(turns, system, None)
        check_order(rest)
        self._check(prompt, rest)
        question = rest[0]
        out = [Segment(image=part) for part in question.parts if isinstance(part, int)]
        # An image leaves the line break that stood beside it; the public prompt has none.
        text = question.text.strip() if out else question.text
        out.append(Segment(text=self.prompt_open, is_template=True))
        if text:
            out.append(Segment(text=text))
        out.append(Segment(text=self.prompt_close, is_template=True))
        for answer in rest[1:]:
            if answer.text:
                out.append(Segment(text=answer.text, is_target=True))
                out.append(Segment(text=self.answer_close, is_target=True, is_template=True))
        return out

    def _check(self, system: str | None, turns: Sequence[Turn]) -> None:
        if system:
            raise RowError(
                f"the template '{self.name}' has no place for a system prompt",
                reason="system_not_supported",
                got=system[:60],
                fix="leave data.system empty and drop the system turn",
            )
        if len(turns) > 2:
            raise RowError(
                f"the template '{self.name}' takes one prompt",
                reason="history_not_supported",
                got=f"{len(turns)} turns",
                expected="a prompt and its answer",
                fix="give every round of the conversation a row of its own",
            )


def paligemma_template() -> PrefixTemplate:
    """Returns the template of PaliGemma and PaliGemma 2."""
    return PrefixTemplate(name="paligemma", stop=("<eos>",), markers=("<bos>", "<eos>"))
