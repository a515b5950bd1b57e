"""Exact token counts of conversations, without making their ids.

The counts are those of `Encoder.tokenise`, for about a tenth of the time: words that were met
before are looked up, and so are the places where what is learnt begins and ends. Whatever cannot
be counted so, for one row or for a whole tokenizer, is tokenised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vistune.data.encode import Encoder, Size
from vistune.data.template import Segment
from vistune.data.words import UncleanError, Words
from vistune.types import Turn

_ANCHOR = Segment(text="a")
_MAX_JOINTS = 100_000


@dataclass(frozen=True, slots=True)
class Counts:
    """What a conversation would become.

    Args:
        text_tokens: Tokens of text, leading tokens included.
        image_tokens: Tokens of images.
        target_tokens: Target tokens; the first position, predicted from nothing, is none.
    """

    text_tokens: int
    image_tokens: int
    target_tokens: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.text_tokens + self.image_tokens


class TokenCounter:
    """Counts tokens; keeps what it has learnt, so use one for many conversations.

    Args:
        encoder: The encoder whose tokens are counted.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._words = Words.of(encoder.tokenizer, forbidden_id=encoder.image_token_id)
        self._joints: dict[tuple[bool, bool, tuple[str, ...]], tuple[int, int]] = {}
        self._num_leading = encoder.num_leading_tokens
        self.num_tokenised = 0
        """Conversations that had to be tokenised."""

    @property
    def counts_words(self) -> bool:
        """Whether this tokenizer's texts can be counted word by word."""
        return self._words is not None

    def count(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> Counts:
        """Returns the counts of a conversation.

        Args:
            turns: The conversation.
            sizes: (height, width) of its images.

        Raises:
            RowError: It cannot be rendered, or its text spells the image token.
        """
        if self._words is not None:
            segments = self._encoder.segments(turns)
            try:
                return self._count(self._words, segments, sizes)
            except UncleanError:
                pass
        self.num_tokenised += 1
        tokens = self._encoder.tokenise_turns(turns, sizes)
        image_tokens = tokens.num_image_tokens
        return Counts(int(tokens.ids.size) - image_tokens, image_tokens, int(tokens.mask[1:].sum()))

    def _count(self, words: Words, segments: list[Segment], sizes: Sequence[Size]) -> Counts:
        text_tokens, image_tokens, target_tokens = self._num_leading, 0, 0
        texts: list[str] = []
        starts_learnt = learns = False
        for segment in segments:
            if segment.image is not None:
                if texts:
                    total, learnt = self._run(words, texts, starts_learnt)
                    text_tokens, target_tokens = text_tokens + total, target_tokens + learnt
                    texts = []
                image_tokens += self._encoder.num_image_tokens(segment.image, sizes)
            elif not texts:
                texts = [segment.text]
                starts_learnt = learns = segment.is_target
            elif segment.is_target == learns:
                texts[-1] += segment.text
            else:
                texts.append(segment.text)
                learns = segment.is_target
        if texts:
            total, learnt = self._run(words, texts, starts_learnt)
            text_tokens, target_tokens = text_tokens + total, target_tokens + learnt
        first = segments[0] if segments else None
        if first is not None and first.is_target and not self._num_leading:
            raise UncleanError  # its first token is predicted from nothing
        return Counts(text_tokens, image_tokens, target_tokens)

    def _run(self, words: Words, texts: list[str], is_learnt: bool) -> tuple[int, int]:
        """Returns tokens and target tokens of a text in pieces, every other of which is learnt."""
        total = learnt = 0
        joint: tuple[str, ...] = ()  # pieces of the word that is not closed yet
        joint_is_learnt, at_start = is_learnt, True
        for text in texts:
            if not joint:
                joint_is_learnt = is_learnt
            parts = _parts(text, is_first=not joint)
            if len(parts) == 1:
                joint += (parts[0],)
                is_learnt = not is_learnt
                continue
            try:
                inner = sum(map(words.__getitem__, parts[1:-1]))
                closed = "".join(joint) + parts[0]
                if not words.is_clean(closed):
                    raise UncleanError
            except UncleanError:
                parts = self._careful(words, text, joint)
                inner = sum(map(words.__getitem__, parts[1:-1]))
            if parts[0]:
                joint += (parts[0],)
            if len(parts) > 1:
                more, more_learnt = self._joint(words, joint, joint_is_learnt, at_start)
                total, learnt = total + more + inner, learnt + more_learnt
                if is_learnt:
                    learnt += inner
                joint, joint_is_learnt, at_start = (f" {parts[-1]}",), is_learnt, False
            is_learnt = not is_learnt
        more, more_learnt = self._joint(words, joint, joint_is_learnt, at_start)
        return total + more, learnt + more_learnt

    def _careful(self, words: Words, text: str, joint: tuple[str, ...]) -> list[str]:
        """Cuts a text that has blanks behind which, or in front of which, no word may end."""
        parts = _parts(text, is_first=not joint, cut=words.cut)
        if len(parts) > 1 and not words.is_clean("".join(joint) + parts[0]):
            raise UncleanError
        return parts

    def _joint(
        self, words: Words, pieces: tuple[str, ...], is_learnt: bool, at_start: bool
    ) -> tuple[int, int]:
        """Returns tokens and target tokens of one word in pieces, every other of them learnt."""
        if len(pieces) == 1 and not at_start and words.is_clean(pieces[0]):
            number = words[pieces[0][1:]]
            return number, number if is_learnt else 0
        key = (at_start, is_learnt, pieces)
        found = self._joints.get(key)
        if found is None:
            found = self._tokenise_joint(pieces, is_learnt, at_start)
            if len(self._joints) < _MAX_JOINTS:
                self._joints[key] = found
        return found

    def _tokenise_joint(
        self, pieces: tuple[str, ...], is_learnt: bool, at_start: bool
    ) -> tuple[int, int]:
        run = [] if at_start else [_ANCHOR]
        run += [
            Segment(text=piece, is_target=is_learnt == (k % 2 == 0))
            for k, piece in enumerate(pieces)
            if piece
        ]
        ids, mask = self._encoder.tokenise_text(run)
        before = 0 if at_start else self._num_anchor_tokens
        return int(ids.size) - before, int(mask.sum())

    @functools.cached_property
    def _num_anchor_tokens(self) -> int:
        return int(self._encoder.tokenise_text([_ANCHOR])[0].size)


def _parts(
    text: str, *, is_first: bool, cut: Callable[[str], list[str]] | None = None
) -> list[str]:
    # The first word of a text has no blank in front of it; if it has, the blank is part of it.
    blank = " " if is_first and text.startswith(" ") else ""
    rest = text[1:] if blank else text
    parts = rest.split(" ") if cut is None else cut(rest)
    parts[0] = blank + parts[0]
    return parts
