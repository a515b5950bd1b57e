"""Counts conversations turn by turn, where a template is the same strings around every turn.

What stands between two texts is cut once, at the first and at the last place where no token can
reach across (a blank behind a word, or a special token). What lies between these two places is
the same in every conversation; what is left of them joins the last word of one text and the first
word of the next. So a text costs one look into a table for each of its words, and nothing that the
template says is looked at again.

Every number comes from the counter's own way of counting a text in pieces; here is only what to
keep of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vistune.data.template.base import Frame
from vistune.data.words import UncleanError, Words
from vistune.types import Turn

Context: TypeAlias = Literal["start", "word", "special"]
"""What a text stands behind: nothing (or an image), a blank and before it a word, a special
token."""
Piece: TypeAlias = tuple[str, bool]
"""Text and whether it is learnt."""
Measure: TypeAlias = Callable[[Sequence[Piece], Context, bool], tuple[int, int]]
"""Returns tokens and target tokens of pieces behind a context; the flag says that a blank follows,
at which it must be allowed to cut. Raises UncleanError."""

_MAX_KEPT = 50_000


@dataclass(frozen=True)
class Seam:
    """What stands between two texts, cut at its first and its last place.

    Args:
        left: What joins the text in front of it.
        closes: Whether the first cut is at a blank, so that this text must end clean.
        tokens: Tokens between the two cuts.
        learnt: Target tokens among them.
        right: What joins the text behind it.
        context: What that stands behind.
    """

    left: tuple[Piece, ...] = ()
    closes: bool = False
    tokens: int = 0
    learnt: int = 0
    right: tuple[Piece, ...] = ()
    context: Context = "start"


IMAGE = Seam()
"""An image: texts on its two sides have nothing to do with each other."""


class Slot:
    """The place of a text between two seams.

    Args:
        words: Tokens of words.
        measure: See `Measure`.
        left: The seam in front of it.
        right: The seam behind it.
        is_learnt: Whether the text is learnt.
    """

    def __init__(
        self, words: Words, measure: Measure, left: Seam, right: Seam, *, is_learnt: bool
    ) -> None:
        self._lookup, self._count_last = words.lookup, words.count_last
        self._measure = measure
        self._left, self._right, self._is_learnt = left, right, is_learnt
        # The first word is one like others where just a blank of its own kind stands in front.
        begins_plain = left.context == "word" and left.right == ((" ", is_learnt),)
        self._is_plain = begins_plain and not right.left
        self._closes = right.closes
        self._heads: dict[str, tuple[int, int]] = {}
        self._tails: dict[str, tuple[int, int]] = {}
        self._whole: dict[str, tuple[int, int]] = {}

    def count(self, text: str) -> tuple[int, int]:
        """Returns tokens and target tokens of a text and of what joins it.

        Raises:
            UncleanError: It cannot be cut everywhere that it would be.
        """
        parts = text.split(" ")
        if self._is_plain:
            if self._closes:
                number = sum(map(self._lookup, parts))
            else:
                number = self._count_last(parts.pop())
                number += sum(map(self._lookup, parts))
            return number, number if self._is_learnt else 0
        if len(parts) == 1:
            return self._whole.get(text) or self._only(text)
        first, last = parts[0], parts[-1]
        head, head_learnt = self._heads.get(first) or self._head(first)
        tail, tail_learnt = self._tails.get(last) or self._tail(last)
        inner = sum(map(self._lookup, parts[1:-1]))
        learnt = head_learnt + tail_learnt
        return head + inner + tail, learnt + inner if self._is_learnt else learnt

    def _head(self, word: str) -> tuple[int, int]:
        pieces = (*self._left.right, (word, self._is_learnt))
        return _kept(self._heads, word, self._measure(pieces, self._left.context, True))

    def _tail(self, word: str) -> tuple[int, int]:
        pieces = ((f" {word}", self._is_learnt), *self._right.left)
        return _kept(self._tails, word, self._measure(pieces, "word", self._right.closes))

    def _only(self, text: str) -> tuple[int, int]:
        pieces = (*self._left.right, (text, self._is_learnt), *self._right.left)
        found = self._measure(pieces, self._left.context, self._right.closes)
        return _kept(self._whole, text, found)


def _kept(table: dict[str, tuple[int, int]], text: str, found: tuple[int, int]) -> tuple[int, int]:
    if len(table) < _MAX_KEPT:
        table[text] = found
    return found


class Rounds:
    """Counts conversations under one template and system prompt.

    Args:
        words: Tokens of words.
        measure: See `Measure`.
        frame: What the template writes around turns.
    """

    def __init__(self, words: Words, measure: Measure, frame: Frame) -> None:
        cutter = _Cutter(words, measure)
        first, answer = cutter.first(frame.first), cutter.between(frame.answer)
        ask, end = cutter.between(frame.ask), cutter.end(frame.end)
        self._edges = (first, answer, ask, end)

        def slot(left: Seam, right: Seam, *, is_learnt: bool = False) -> Slot:
            return Slot(words, measure, left, right, is_learnt=is_learnt)

        self._questions = slot(first, answer), slot(ask, answer)
        self._before_image = slot(first, IMAGE), slot(ask, IMAGE)
        self._between_images, self._behind_image = slot(IMAGE, IMAGE), slot(IMAGE, answer)
        # Right behind an image the text begins with what the template says.
        begun = cutter.first(frame.answer)
        self._image_ends = begun.tokens - answer.tokens, begun.learnt - answer.learnt
        self._answer, self._last = (slot(answer, seam, is_learnt=True) for seam in (ask, end))

    @classmethod
    def of(cls, words: Words, measure: Measure, frame: Frame | None) -> Rounds | None:
        """Returns the counter of a template, or None where its strings cannot be cut.

        Args:
            words: Tokens of words.
            measure: See `Measure`.
            frame: What the template writes around turns; None where these are no fixed strings.
        """
        try:
            return None if frame is None else cls(words, measure, frame)
        except UncleanError:
            return None

    def count(self, turns: Sequence[Turn]) -> tuple[int, int]:
        """Returns tokens of text and target tokens of a conversation without a system turn.

        Args:
            turns: User and assistant in turn, ending with an answer; no answer is empty.

        Raises:
            UncleanError: It has to be counted another way.
        """
        first, answer, ask, end = self._edges
        rounds = len(turns) // 2
        total = first.tokens + rounds * answer.tokens + (rounds - 1) * ask.tokens + end.tokens
        learnt = first.learnt + rounds * answer.learnt + (rounds - 1) * ask.learnt + end.learnt
        last = len(turns) - 1
        for k, turn in enumerate(turns):
            parts = turn.parts
            if len(parts) == 1 and isinstance(parts[0], str):
                if k & 1:
                    slot = self._last if k == last else self._answer
                else:
                    slot = self._questions[k > 0]
                more, more_learnt = slot.count(parts[0])
            elif k & 1:
                raise UncleanError  # an answer that is empty or in pieces
            else:
                more, more_learnt = self._question(turn, is_first=k == 0)
            total += more
            learnt += more_learnt
        return total, learnt

    def _question(self, turn: Turn, *, is_first: bool) -> tuple[int, int]:
        total = learnt = 0
        text, slot = "", self._before_image[not is_first]
        has_image = False
        for part in turn.parts:
            if isinstance(part, str):
                text += part
                continue
            more, more_learnt = slot.count(text)
            total, learnt = total + more, learnt + more_learnt
            text, slot, has_image = "", self._between_images, True
        slot = self._behind_image if has_image else self._questions[not is_first]
        more, more_learnt = slot.count(text) if text or not has_image else self._image_ends
        return total + more, learnt + more_learnt


class _Cutter:
    """Makes seams of what a template writes between two texts."""

    def __init__(self, words: Words, measure: Measure) -> None:
        self._words = words
        self._measure = measure

    def first(self, pieces: Sequence[Piece]) -> Seam:
        """Returns what stands in front of a conversation."""
        if not any(text for text, _ in pieces):
            raise UncleanError  # the first token is predicted from nothing
        cuts = self._cuts(pieces)
        if not cuts:
            return Seam(right=tuple(pieces))
        start, stop = cuts[-1]
        tokens, learnt = self._measured(pieces, 0, (start, stop), "start")
        context: Context = "special" if stop > start else "word"
        return Seam((), False, tokens, learnt, _slice(pieces, stop), context)

    def between(self, pieces: Sequence[Piece]) -> Seam:
        """Returns what stands between two texts."""
        cuts = self._cuts(pieces)
        if not cuts:
            raise UncleanError
        (first, begin), last = cuts[0], cuts[-1]
        left, closes = _slice(pieces, 0, first), begin == first
        tokens, learnt = (0, 0) if closes else (1, _is_learnt(pieces, first, begin))
        if len(cuts) > 1:
            context: Context = "word" if closes else "special"
            more, more_learnt = self._measured(pieces, begin, last, context)
            tokens, learnt = tokens + more, learnt + more_learnt
        context = "special" if last[1] > last[0] else "word"
        return Seam(left, closes, tokens, learnt, _slice(pieces, last[1]), context)

    def end(self, pieces: Sequence[Piece]) -> Seam:
        """Returns what stands behind a conversation."""
        cuts = self._cuts(pieces)
        if not cuts:
            return Seam(left=tuple(piece for piece in pieces if piece[0]))
        start, stop = cuts[0]
        closes = stop == start
        tokens, learnt = (0, 0) if closes else (1, _is_learnt(pieces, start, stop))
        context: Context = "word" if closes else "special"
        more, more_learnt = self._measure(_slice(pieces, stop), context, False)
        return Seam(_slice(pieces, 0, start), closes, tokens + more, learnt + more_learnt)

    def _measured(
        self, pieces: Sequence[Piece], begin: int, cut: tuple[int, int], context: Context
    ) -> tuple[int, int]:
        """Returns tokens from a place up to a cut, the special token there included."""
        start, stop = cut
        tokens, learnt = self._measure(_slice(pieces, begin, start), context, stop == start)
        if stop > start:
            tokens, learnt = tokens + 1, learnt + _is_learnt(pieces, start, stop)
        return tokens, learnt

    def _cuts(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Returns first and last character of special tokens, and of blanks twice the first."""
        text = "".join(piece[0] for piece in pieces)
        spans = self._words.special_spans(text)
        inside = {at for start, stop in spans for at in range(start, stop)}
        blanks = [
            (at, at)
            for at, char in enumerate(text)
            if char == " " and at not in inside and (at == 0 or self._words.is_clean(text[:at]))
        ]
        return sorted([*spans, *blanks])


def _slice(pieces: Sequence[Piece], start: int, stop: int | None = None) -> tuple[Piece, ...]:
    """Returns the pieces from one character up to another; empty ones are left out."""
    out, before = [], 0
    for text, flag in pieces:
        end = len(text) if stop is None else max(0, stop - before)
        part = text[max(0, start - before) : end]
        if part:
            out.append((part, flag))
        before += len(text)
    return tuple(out)


def _is_learnt(pieces: Sequence[Piece], start: int, stop: int) -> bool:
    return any(flag for _, flag in _slice(pieces, start, stop))


__all__ = ["Context", "Measure", "Piece", "Rounds"]
