"""Templates that are a handful of fixed strings around every turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vistune.data.template.base import (
    ChatTemplate,
    Frame,
    Segment,
    Stretch,
    check_order,
    split_system,
)
from vistune.errors import RowError
from vistune.types import Turn


class PieceTemplate(ChatTemplate):
    """A template in which every turn is its text between fixed strings.

    A conversation is: the system block, then per turn `user_mark` `user_open` text `user_close` and
    `answer_cue` `answer_open` text `answer_close` `answer_gap`, then `end`; of these, `user_mark`,
    `answer_open`, the answer, `answer_close` and `end` are learnt. A generation prompt ends after
    `answer_cue`; so does an answer with no text at all, unless `close_empty`.
    """

    kind: Literal["pieces"] = "pieces"
    """Tells this form of template from the others in a checkpoint."""
    system_default: str | None = None
    """System prompt used where none is given."""
    system_open: str = ""
    """In front of the system prompt."""
    system_close: str = ""
    """Behind the system prompt."""
    system_in_user: bool = False
    """The system block stands inside the first user turn, behind `user_open`."""
    user_mark: str = ""
    """In front of `user_open`. Learnt: where nothing ends an answer, the next turn's mark does."""
    user_open: str = ""
    """In front of a user's text."""
    user_reopen: str | None = None
    """In front of every user's text but the first; `user_open` when left out."""
    user_close: str = ""
    """Behind a user's text."""
    answer_cue: str = ""
    """What tells the model to answer. Not learnt, unless `learn_cue`."""
    learn_cue: bool = False
    """`answer_cue` is learnt."""
    answer_open: str = ""
    """In front of an answer. Learnt."""
    answer_close: str = ""
    """Behind an answer. Learnt."""
    answer_gap: str = ""
    """Behind that. Not learnt."""
    end: str = ""
    """Behind the last turn. Learnt."""
    close_empty: bool = False
    """An answer with no text still gets `answer_open` and `answer_close`."""
    caption_only: bool = False
    """The conversation is images and one caption: a user's text is dropped."""

    def shown(self, answer: str) -> str:
        """Returns an answer without what the template itself writes in front of one."""
        return answer.removeprefix(self.answer_open)

    def num_settled(self, answer: str) -> int:
        """Returns how many characters the next ones do not change; see `ChatTemplate`."""
        return 0 if self.answer_open.startswith(answer) else len(answer)

    def segments(
        self,
        turns: Sequence[Turn],
        system: str | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> list[Segment]:
        """Renders a conversation. See `ChatTemplate.segments`."""
        prompt, rest = split_system(turns, system, self.system_default)
        check_order(rest)
        if self.caption_only:
            self._check_caption(rest)
        block = "" if not prompt else f"{self.system_open}{prompt}{self.system_close}"
        out: list[Segment] = []
        if not self.system_in_user:
            _write(out, block)
        for index, turn in enumerate(rest):
            if turn.speaker == "user":
                first = index == 0 or self.user_reopen is None
                _write(out, self.user_mark, is_target=True)
                _write(out, self.user_open if first else self.user_reopen or "")
                if index == 0 and self.system_in_user:
                    _write(out, block)
                _say(out, turn, only_images=self.caption_only)
                _write(out, self.user_close)
            else:
                self._answer(out, turn)
        if add_generation_prompt:
            _write(out, self.answer_cue)
        else:
            _write(out, self.end, is_target=True)
        return out

    def stretches(self, turns: Sequence[Turn], system: str | None = None) -> list[Stretch]:
        """Renders a conversation. See `ChatTemplate.stretches`."""
        prompt, rest = split_system(turns, system, self.system_default)
        check_order(rest)
        if self.caption_only:
            self._check_caption(rest)
        block = "" if not prompt else f"{self.system_open}{prompt}{self.system_close}"
        text = "" if self.system_in_user else block
        reopen = self.user_open if self.user_reopen is None else self.user_reopen
        out: list[Stretch] = []
        for index, turn in enumerate(rest):
            if turn.speaker == "user":
                if self.user_mark:
                    out += [(text, False), (self.user_mark, True)]
                    text = ""
                text += reopen if index else self.user_open
                if index == 0 and self.system_in_user:
                    text += block
                for part in turn.parts:
                    if isinstance(part, int):
                        out += [(text, False), part]
                        text = ""
                    elif not self.caption_only:
                        text += part
                text += self.user_close
                continue
            answer = turn.text
            out += [(text, False), (self.answer_cue, self.learn_cue)]
            text = ""
            if answer or self.close_empty:
                out.append((f"{self.answer_open}{answer}{self.answer_close}", True))
                text = self.answer_gap
        out += [(text, False), (self.end, True)]
        return [stretch for stretch in out if isinstance(stretch, int) or stretch[0]]

    def frame(self, system: str | None = None) -> Frame | None:
        """Returns what stands around turns. See `ChatTemplate.frame`."""
        if self.caption_only:
            return None
        prompt = self.system_default if system is None else system
        block = "" if not prompt else f"{self.system_open}{prompt}{self.system_close}"
        reopen = self.user_open if self.user_reopen is None else self.user_reopen
        before, inside = ("", block) if self.system_in_user else (block, "")
        mark, close = (self.user_mark, True), (self.answer_close, True)
        gap = (self.answer_gap, False)
        return Frame(
            first=_joined((before, False), mark, (self.user_open + inside, False)),
            answer=_joined(
                (self.user_close, False),
                (self.answer_cue, self.learn_cue),
                (self.answer_open, True),
            ),
            ask=_joined(close, gap, mark, (reopen, False)),
            end=_joined(close, gap, (self.end, True)),
        )

    def _answer(self, out: list[Segment], turn: Turn) -> None:
        _write(out, self.answer_cue, is_target=self.learn_cue)
        if not turn.text and not self.close_empty:
            return
        _write(out, self.answer_open, is_target=True)
        if turn.text:
            out.append(Segment(text=turn.text, is_target=True))
        _write(out, self.answer_close, is_target=True)
        _write(out, self.answer_gap)

    def _check_caption(self, turns: Sequence[Turn]) -> None:
        has_image = any(isinstance(part, int) for part in turns[0].parts)
        if len(turns) > 2 or not has_image:
            raise RowError(
                f"the template '{self.name}' takes one picture and its caption",
                reason="not_a_caption",
                got=f"{len(turns)} turns, {'an' if has_image else 'no'} image in the first",
                expected="a human turn with <image> and one answer",
                fix="choose another data.template for conversations",
            )


def _write(out: list[Segment], text: str, *, is_target: bool = False) -> None:
    if text:
        out.append(Segment(text=text, is_target=is_target, is_template=True))


def _joined(*pieces: tuple[str, bool]) -> tuple[tuple[str, bool], ...]:
    """Returns texts in order, neighbours of one kind as one; an empty one where there is none."""
    out: list[tuple[str, bool]] = []
    for text, is_learnt in pieces:
        if out and text and out[-1][1] == is_learnt:
            out[-1] = (out[-1][0] + text, is_learnt)
        elif text:
            out.append((text, is_learnt))
    return tuple(out) or (("", False),)


def _say(out: list[Segment], turn: Turn, *, only_images: bool) -> None:
    for part in turn.parts:
        if isinstance(part, int):
            out.append(Segment(image=part))
        elif part and not only_images:
            out.append(Segment(text=part))
