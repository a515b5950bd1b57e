"""Exact token counts of conversations, without making their ids.

The counts are those of `Encoder.tokenise`, for about a tenth of the time: words that were met
before are looked up, and so are the places where what is learnt begins and ends. Whatever cannot
be counted so, for one row or for a whole tokenizer, is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vistune.data.encode import Encoder, Size
from vistune.data.rounds import Context, Piece, Rounds
from vistune.data.template import Segment, Stretch
from vistune.data.template.base import check_order
from vistune.data.words import ANCHOR, UncleanError, Words
from vistune.errors import RowError
from vistune.types import Turn

_MAX_JOINTS = 50_000
_MAX_LEADS = 100


class Counts(NamedTuple):
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
        self._joints: dict[tuple[Context, bool, tuple[str, ...]], tuple[int, int]] = {}
        self._closed_joints: dict[tuple[Context, bool, tuple[str, ...]], tuple[int, int]] = {}
        self._sections: dict[tuple[Context, tuple[tuple[str, bool], ...]], tuple[int, int]] = {}
        self._leads: dict[tuple[str, bool], tuple[int, int]] = {}
        self._end = "" if self._words is None else self._words.plain_end(_answer_end(encoder))
        self._num_leading = encoder.num_leading_tokens
        self._rounds: Rounds | None = None
        if self._words is not None:
            frame = encoder.template.frame(encoder.system)
            self._rounds = Rounds.of(self._words, self._measure, frame)
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
        if self._rounds is not None and turns and turns[-1].speaker == "assistant":
            try:
                return self._count_rounds(self._rounds, turns, sizes)
            except UncleanError:
                pass  # texts are put together and cut with more care
        if self._words is not None:
            stretches = self._encoder.template.stretches(turns, self._encoder.system)
            try:
                return self._count(self._words, stretches, sizes)
            except UncleanError:
                pass  # word counts cannot be trusted with this text: it is tokenised below
        self.num_tokenised += 1
        tokens = self._encoder.tokenise_turns(turns, sizes)
        image_tokens = tokens.num_image_tokens
        return Counts(int(tokens.ids.size) - image_tokens, image_tokens, int(tokens.mask[1:].sum()))

    def _count_rounds(self, rounds: Rounds, turns: Sequence[Turn], sizes: Sequence[Size]) -> Counts:
        if turns[0].speaker == "system":
            raise UncleanError
        check_order(turns)
        text_tokens, target_tokens = rounds.count(turns)
        order = [part for turn in turns for part in turn.parts if isinstance(part, int)]
        image_tokens = self._image_tokens(order, sizes)
        return Counts(self._num_leading + text_tokens, image_tokens, target_tokens)

    def _image_tokens(self, order: Sequence[int], sizes: Sequence[Size]) -> int:
        """Returns the tokens of the images that a conversation shows, which may be some of all."""
        encoder = self._encoder
        for image in order:
            if image >= len(sizes):
                encoder.num_image_tokens(image, sizes)  # says that there is no such image
        # How many are shown may decide how: those that are left out do not count.
        shown = [sizes[image] for image in order]
        return sum([encoder.num_image_tokens(k, shown) for k in range(len(shown))])

    def _measure(self, pieces: Sequence[Piece], context: Context, closes: bool) -> tuple[int, int]:
        """Returns tokens and target tokens of pieces; see `rounds.Measure`."""
        assert self._words is not None
        if closes and not self._words.is_clean("".join([text for text, _ in pieces])):
            raise UncleanError
        texts: list[str] = []
        starts_learnt = learns = False
        for text, flag in pieces:
            if not text:
                continue
            if not texts:
                texts, starts_learnt = [text], flag
            elif flag == learns:
                texts[-1] += text
            else:
                texts.append(text)
            learns = flag
        return self._run(self._words, texts, starts_learnt, context) if texts else (0, 0)

    def _count(self, words: Words, stretches: list[Stretch], sizes: Sequence[Size]) -> Counts:
        text_tokens, target_tokens = self._num_leading, 0
        order = [stretch for stretch in stretches if isinstance(stretch, int)]
        image_tokens = self._image_tokens(order, sizes)
        texts: list[str] = []
        starts_learnt = learns = False
        context: Context = "start"
        has_image = False
        for stretch in [*stretches, None]:
            is_text = isinstance(stretch, tuple)
            if isinstance(stretch, tuple):
                text, is_learnt = stretch
                if not texts:
                    texts, starts_learnt, learns = [text], is_learnt, is_learnt
                elif is_learnt == learns:
                    texts[-1] += text
                else:
                    texts.append(text)
                    learns = is_learnt
                if not self._end or not text.endswith(self._end):
                    continue
                # What follows the end of an answer has nothing to do with what was before.
                texts[-1] = texts[-1][: -len(self._end)]
            if texts:
                if starts_learnt and text_tokens == 0 and not has_image:
                    raise UncleanError  # its first token is predicted from nothing
                if stretch is not None and len(texts) == 1 and context == "start":
                    total, learnt = self._lead(words, texts[0], starts_learnt)
                else:
                    total, learnt = self._run(words, texts, starts_learnt, context)
                text_tokens, target_tokens = text_tokens + total, target_tokens + learnt
                texts = []
            context = "start"
            if is_text:
                text_tokens, target_tokens = text_tokens + 1, target_tokens + learns
                context = "special"
            elif stretch is not None:
                has_image = True
        return Counts(text_tokens, image_tokens, target_tokens)

    def _lead(self, words: Words, text: str, is_learnt: bool) -> tuple[int, int]:
        """Returns the same as `_run` for what stands in front of an image: mostly the same text."""
        found = self._leads.get((text, is_learnt))
        if found is None:
            found = self._run(words, [text], is_learnt, "start")
            if len(self._leads) < _MAX_LEADS:
                self._leads[text, is_learnt] = found
        return found

    def _run(
        self, words: Words, texts: list[str], is_learnt: bool, context: Context
    ) -> tuple[int, int]:
        """Returns tokens and target tokens of a text in pieces, every other of which is learnt."""
        lookup = words.lookup
        total = learnt = 0
        # What is not closed by a blank yet: a word behind a blank, or a joint of several pieces.
        word: str | None = None
        joint: tuple[str, ...] = ()
        open_is_learnt = is_learnt
        for text in texts:
            at_start = word is None and not joint
            parts = _start_parts(text) if at_start and text[:1] == " " else text.split(" ")
            if len(parts) > 1:
                try:
                    if word is not None and not parts[0]:
                        more = lookup(word)
                        more_learnt = more if open_is_learnt else 0
                    else:
                        pieces = joint if word is None else (f" {word}",)
                        closed = (*pieces, parts[0]) if parts[0] else pieces
                        more, more_learnt = self._closed(words, closed, open_is_learnt, context)
                    inner = sum(map(lookup, parts[1:-1]))
                except UncleanError:
                    pieces = joint if word is None else (f" {word}",)
                    parts = self._careful(words, text, at_start=at_start)
                    closed = (*pieces, parts[0]) if parts[0] else pieces
                    if len(parts) == 1:
                        word, joint, is_learnt = None, closed, not is_learnt
                        continue
                    more, more_learnt = self._closed(words, closed, open_is_learnt, context)
                    inner = words.count(parts[1:-1])
                total, learnt = total + more + inner, learnt + more_learnt
                if is_learnt:
                    learnt += inner
                word, joint, open_is_learnt, context = parts[-1], (), is_learnt, "word"
            else:
                joint = (*joint, text) if word is None else (f" {word}", text)
                word = None
            is_learnt = not is_learnt
        more, more_learnt = self._joint(
            joint if word is None else (f" {word}",), open_is_learnt, context
        )
        return total + more, learnt + more_learnt

    def _careful(self, words: Words, text: str, *, at_start: bool) -> list[str]:
        """Cuts a text that has blanks behind which, or in front of which, no word may end."""
        if not at_start or text[:1] != " ":
            return words.cut(text)
        head, *rest = words.cut(text[1:])
        return [f" {head}", *rest]

    def _closed(
        self, words: Words, pieces: tuple[str, ...], is_learnt: bool, context: Context
    ) -> tuple[int, int]:
        """Returns the same as `_joint` for a word behind which there is a blank."""
        if len(pieces) == 1 and context == "word":
            number = words.lookup(pieces[0][1:])
            return number, number if is_learnt else 0
        found = self._closed_joints.get((context, is_learnt, pieces))
        if found is None:
            if not words.is_clean("".join(pieces)):
                raise UncleanError
            found = self._joint(pieces, is_learnt, context)
            if len(self._closed_joints) < _MAX_JOINTS:
                self._closed_joints[context, is_learnt, pieces] = found
        return found

    def _joint(self, pieces: tuple[str, ...], is_learnt: bool, context: Context) -> tuple[int, int]:
        """Returns tokens and target tokens of one word in pieces, every other of them learnt."""
        if len(pieces) == 1 and context == "word" and self._words is not None:
            number = self._words.table.get(pieces[0][1:])
            if number is not None:
                return number, number if is_learnt else 0
        key = (context, is_learnt, pieces)
        found = self._joints.get(key)
        if found is None:
            found = self._tokenise_joint(pieces, is_learnt, context)
            if len(self._joints) < _MAX_JOINTS:
                self._joints[key] = found
        return found

    def _tokenise_joint(
        self, pieces: tuple[str, ...], is_learnt: bool, context: Context
    ) -> tuple[int, int]:
        words = self._words
        assert words is not None
        flags = [is_learnt == (k % 2 == 0) for k in range(len(pieces))]
        cut = [words.sections(piece) for piece in pieces]
        if sum(map(len, cut)) - len(cut) != len(words.sections("".join(pieces))) - 1:
            cut = [[piece] for piece in pieces]  # two pieces spell a special token together
        total = learnt = 0
        section: list[tuple[str, bool]] = []
        for chunks, flag in zip(cut, flags, strict=True):
            for k, chunk in enumerate(chunks):
                if k:  # a special token stands in front of it
                    more, more_learnt = self._section(words, context, section)
                    total, learnt = total + more + 1, learnt + more_learnt + flag
                    context, section = "special", []
                if chunk:
                    section.append((chunk, flag))
        more, more_learnt = self._section(words, context, section)
        return total + more, learnt + more_learnt

    def _section(
        self, words: Words, context: Context, section: list[tuple[str, bool]]
    ) -> tuple[int, int]:
        """Returns tokens and target tokens of a text in pieces, behind what `context` says."""
        if not section:
            return 0, 0
        if len(section) == 1 and context == "word":
            number = words.count_last(section[0][0][1:])
            return number, number if section[0][1] else 0
        key = (context, tuple(section))
        found = self._sections.get(key)
        if found is None:
            front = {"start": "", "word": ANCHOR, "special": words.a_special}[context]
            run = [Segment(text=front)] if front else []
            run += [Segment(text=text, is_target=flag) for text, flag in section]
            try:
                ids, mask = self._encoder.tokenise_text(run)
            except RowError as error:  # of a text made up to be counted: the row may be fine
                raise UncleanError from error
            found = int(ids.size) - words.front_tokens(front), int(mask.sum())
            if len(self._sections) < _MAX_JOINTS:
                self._sections[key] = found
        return found


def _start_parts(text: str) -> list[str]:
    # A text that starts with a blank: the blank is part of its first word.
    parts = text[1:].split(" ")
    parts[0] = f" {parts[0]}"
    return parts


def _answer_end(encoder: Encoder) -> str:
    """Returns what the template writes behind an answer."""
    probe = "answer"
    turns = (Turn("user", (0, "question")), Turn("assistant", (probe,)))
    try:
        stretches = encoder.template.stretches(turns)
    except RowError:
        return ""
    learnt = [stretch[0] for stretch in stretches if isinstance(stretch, tuple) and stretch[1]]
    return "".join(learnt).rpartition(probe)[2]
