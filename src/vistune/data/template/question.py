"""The template of CogVLM2: images in front, then questions and answers named in plain words.

It is not Llama-3's chat template, although the decoder is a Llama-3. Only the last answer is
learnt, because that is the only one that ends with the end of text: earlier rounds are history.

Source: CogVLM2-Llama3-chat-19B, `build_conversation_input_ids` of the remote code. One difference:
there prompt and answer are tokenised apart and the answer starts without a blank; here they are one
text, so the answer starts with the blank that answers in the history have (without it ":" and the
first letters can become one token).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vistune.data.template.base import ChatTemplate, Segment, check_order, split_system
from vistune.errors import RowError
from vistune.types import Turn

QuestionVersion = Literal["base", "chat", "vqa"]


class QuestionTemplate(ChatTemplate):
    """Images, then rounds of `Question: ... Answer: ...`, then the question to answer."""

    kind: Literal["question"] = "question"
    """Tells this form of template from the others in a checkpoint."""
    question_open: str = "Question: "
    """In front of a question."""
    answer_cue: str = " Answer:"
    """What tells the model to answer. Not learnt."""
    answer_open: str = " "
    """In front of an answer. Learnt where the answer is."""
    history_close: str = "\n"
    """Behind an earlier answer. Not learnt."""
    answer_close: str = "<|end_of_text|>"
    """Behind the last answer. Learnt."""
    keeps_history: bool = True
    """Whether there may be earlier rounds."""

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
        self._check(prompt, rest)
        out = [Segment(image=part) for t in rest for part in t.parts if isinstance(part, int)]
        last = len(rest) - 1
        for index, turn in enumerate(rest):
            if turn.speaker == "user":
                self._ask(out, turn, cue=index < last or add_generation_prompt)
            elif index < last:
                answer = f"{self.answer_open}{turn.text}"
                out.append(Segment(text=answer))
                _write(out, self.history_close)
            elif turn.text:
                _write(out, self.answer_open, is_target=True)
                out.append(Segment(text=turn.text, is_target=True))
                _write(out, self.answer_close, is_target=True)
        return out

    def shown(self, answer: str) -> str:
        """Returns an answer without the blank in front, which the template itself writes."""
        return answer.removeprefix(self.answer_open)

    def num_settled(self, answer: str) -> int:
        """Returns how many characters the next ones do not change; see `ChatTemplate`."""
        return 0 if self.answer_open.startswith(answer) else len(answer)

    def _ask(self, out: list[Segment], turn: Turn, *, cue: bool) -> None:
        # An image leaves the line break that stood beside it; the public prompt has none.
        has_image = any(isinstance(part, int) for part in turn.parts)
        _write(out, self.question_open)
        text = turn.text.strip() if has_image else turn.text
        if text:
            out.append(Segment(text=text))
        if cue:
            _write(out, self.answer_cue)

    def _check(self, prompt: str | None, turns: Sequence[Turn]) -> None:
        if prompt:
            raise RowError(
                f"the template '{self.name}' has no place for a system prompt",
                reason="system_not_supported",
                got=prompt[:60],
                fix="leave data.system empty and drop the system turn",
            )
        if len(turns) > 2 and not self.keeps_history:
            raise RowError(
                f"the template '{self.name}' takes one question",
                reason="history_not_supported",
                got=f"{len(turns)} turns",
                expected="a question and its answer",
                fix="choose the template cogvlm2_chat for conversations",
            )


def _write(out: list[Segment], text: str, *, is_target: bool = False) -> None:
    if text:
        out.append(Segment(text=text, is_target=is_target, is_template=True))


def cogvlm2_template(version: QuestionVersion = "chat") -> QuestionTemplate:
    """Returns one of the three templates of CogVLM2.

    Args:
        version: `template_version` of the model's config: "chat" asks for an answer, "vqa" for a
            short one, "base" passes the question on as it is and knows no history.
    """
    end = "<|end_of_text|>"
    template = QuestionTemplate(
        name=f"cogvlm2_{version}", stop=(end, "<|eot_id|>"), markers=(end,), answer_close=end
    )
    if version == "vqa":
        return template.model_copy(update={"answer_cue": " Short answer:"})
    if version == "base":
        bare = {"question_open": "", "answer_cue": "", "answer_open": "", "keeps_history": False}
        return template.model_copy(update=bare)
    return template
