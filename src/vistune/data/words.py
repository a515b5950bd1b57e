"""How many tokens a text has, without tokenising it again: the sum over its words.

A tokenizer need not see a text whole to count its tokens, where it can be shown that no token ever
reaches across a blank between two words. Then the count of a text is the sum of the counts of its
words, and a word that was met before costs one look into a table. `Words.of` shows it from the
tokenizer's own description, and gives None where it cannot; nothing here is an estimate.

Why it holds, for the two families of tokenizers in use:

- Byte-pair merges over text whose blanks became "▁" (Llama, Gemma): a merge across "x▁" would have
  to make a token with "▁" behind another character. The vocabulary is searched for them; behind
  the few marks in front of such a "▁" (Gemma has one, "> </") there is no cut.
- Byte-level merges behind a regular expression (GPT-2, Llama-3, Qwen): merges stay inside what one
  match gave. No alternative that is accepted here can match a blank behind a visible character or
  looks back, so a match always ends in front of that blank. Nor does one match a letter beside a
  digit, or either in front of the marks that a word ends with: new words are cut there as well.

A blank behind a blank, a line break or a special token is no such place, and is never cut at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_WORDS = 400_000
_MAX_WORD_CHARS = 48
ANCHOR = "a"
"""A text in front of a word, so that the word stands where words stand."""
_MARKS = ".,:;!?)]}'\""
_MARK_CHARS = frozenset(_MARKS)
_LETTERS_OR_DIGITS = re.compile("[A-Za-z]+|[0-9]+")
_MARK_PAIR = re.compile(f"[^{re.escape(_MARKS)}][{re.escape(_MARKS)}]")

_ALTERNATIVES = frozenset(
    {
        # contractions
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?i:[sdmt]|ll|ve|re)",
        "'(?i:[sdmt]|ll|ve|re)",
        # letters
        r" ?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        # digits
        r" ?\p{N}+",
        r"\p{N}",
        r"\p{N}+",
        r"\p{N}{1,3}",
        r"\d",
        r"\d+",
        # marks
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        # blanks
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
        # letters by case
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    }
)
"""Alternatives of pre-tokenizers' expressions that match no blank behind a visible character."""

_BEFORE_BLANK = re.compile("([^▁\n])▁")
_CUT = re.compile(r"(?<![\s▁]) ")


class UncleanError(Exception):
    """A word behind which no cut is allowed. Never leaves the data layer."""


@dataclass(frozen=True, slots=True)
class _Added:
    """The tokenizer's added tokens: behind one, a blank is not what it is behind a word."""

    texts: tuple[str, ...]
    last_chars: frozenset[str]
    first_chars: frozenset[str]

    @classmethod
    def of(cls, texts: tuple[str, ...]) -> _Added:
        return cls(texts, frozenset(t[-1] for t in texts), frozenset(t[0] for t in texts))

    def may_be_in(self, text: str) -> bool:
        return not self.first_chars.isdisjoint(text)

    def ends(self, text: str) -> bool:
        return text[-1:] in self.last_chars and text.endswith(self.texts)


class _Table(dict[str, int]):
    """A table whose missing words are asked for one by one.

    So a list of words is summed in one pass, whether all of them were met before or not.
    """

    def __init__(self, learn: Callable[[str], int]) -> None:
        self._learn = learn

    def __missing__(self, word: str) -> int:
        number = self._learn(word)
        if len(word) <= _MAX_WORD_CHARS and len(self) < _MAX_WORDS:
            self[word] = number
        return number


class Words:
    """Tokens of words, each with the blank in front of it; filled as words are met.

    Args:
        backend: The tokenizer's Rust backend.
        added: The texts of its added tokens.
        plain: Those of them that stand for themselves wherever they stand, longest first.
        pairs: A mark behind another character, wherever a token holds the two: no merge joins any
            others. None where a token's characters are not those of the text.
        cuts_runs: Whether no token holds a letter beside a digit, or a letter or digit in front of
            the marks that end a word.
        joining: Characters behind which a token may reach across a blank.
        forbidden_id: A token that no text may spell: such a word is unclean.
    """

    def __init__(
        self,
        backend: Any,
        added: tuple[str, ...],
        *,
        plain: list[str],
        pairs: frozenset[str] | None,
        cuts_runs: bool = False,
        joining: frozenset[str] = frozenset(),
        forbidden_id: int,
    ) -> None:
        self.table = _Table(self._meet)
        """Tokens of the clean words met so far."""
        self.lookup = self.table.__getitem__
        """Returns the tokens of a word behind which there is a blank, or raises UncleanError."""
        self._backend = backend
        self._added = _Added.of(added)
        self._pairs = pairs
        self._unclean_ends = frozenset({"", "▁"}) | joining
        self._forbidden_id = forbidden_id
        # Where a blank is "▁" and nothing else is changed, the merges can be asked directly.
        is_in_model = forbidden_id in range(backend.get_vocab_size(with_added_tokens=False))
        self._model = None if pairs is None or is_in_model else backend.model
        self._cuts_runs = cuts_runs and not is_in_model
        self._runs: dict[str, int] = {}
        self._special = _any_of(plain)
        self._plain = plain
        self.a_special = plain[0] if plain else ""
        """A special token."""
        self._marks: dict[str, int] = {}
        self._anchor_tokens = len(backend.encode(ANCHOR, add_special_tokens=False))

    @classmethod
    def of(cls, tokenizer: Any, *, forbidden_id: int) -> Words | None:
        """Returns the table of a tokenizer, or None where its texts cannot be cut at blanks.

        Args:
            tokenizer: A transformers tokenizer with a Rust backend.
            forbidden_id: See the class.
        """
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        joining = _joining_marks(content)
        if joining is None:
            return None
        added = tuple(token["content"] for token in content["added_tokens"])
        steps = _steps(content["pre_tokenizer"], "pretokenizers")
        in_bytes = bool(steps) and steps[-1]["type"] == "ByteLevel"
        vocabulary = "\n".join(content["model"]["vocab"])
        pairs = None if in_bytes else frozenset(_MARK_PAIR.findall(vocabulary))
        return cls(
            tokenizer.backend_tokenizer,
            added,
            plain=_plain_tokens(content["added_tokens"]),
            pairs=pairs,
            cuts_runs=in_bytes,
            joining=joining,
            forbidden_id=forbidden_id,
        )

    def count(self, words: Sequence[str]) -> int:
        """Returns the tokens of words, each with a blank in front.

        Raises:
            UncleanError: A blank may not be cut at behind one of them.
        """
        return sum(map(self.lookup, words))

    def _meet(self, word: str) -> int:
        """Returns the tokens of a clean word."""
        # Letters and digits alone are clean, unless an added token stands among them.
        if self._model is None or not word.isalnum() or self._added.may_be_in(word):
            if not self.is_clean(word):
                raise UncleanError
            return self._learn(word)
        return len(self._model.tokenize("▁" + word))

    def _learn(self, word: str) -> int:
        if self._pairs is not None and word[-1:] in _MARK_CHARS and not self._added.may_be_in(word):
            # Marks at the end of a word are often tokens of their own: "door," is "door" and ",".
            core = word.rstrip(_MARKS)
            if core and core[-1] + word[len(core)] not in self._pairs:
                return self.count_last(core) + self._count_marks(core[-1], word[len(core) :])
        is_plain = " " not in word and not self._added.may_be_in(word)
        if self._model is not None and is_plain:
            return len(self._model.tokenize("▁" + word))
        if self._cuts_runs and is_plain:
            first, *rest = _runs(word)
            if rest:
                return self.count_last(first) + sum(map(self._count_run, rest))
        ids = self._backend.encode(f"{ANCHOR} {word}", add_special_tokens=False).ids
        if self._forbidden_id in ids:
            raise UncleanError
        return len(ids) - self._anchor_tokens

    def _count_run(self, run: str) -> int:
        """Returns the tokens of letters, digits or marks behind others."""
        number = self._runs.get(run)
        if number is None:
            number = len(self._backend.encode(run, add_special_tokens=False))
            if len(run) <= _MAX_WORD_CHARS and len(self._runs) < _MAX_WORDS:
                self._runs[run] = number
        return number

    def count_last(self, word: str) -> int:
        """Returns the tokens of a word where the text ends, or a special token follows."""
        number = self.table.get(word)
        if number is None:
            number = self.lookup(word) if self.is_clean(word) else self._learn(word)
        return number

    def front_tokens(self, front: str) -> int:
        """Returns the tokens of "", `ANCHOR` or `a_special`."""
        return self._anchor_tokens if front == ANCHOR else len(front[:1])

    def plain_end(self, text: str) -> str:
        """Returns the text if it is one special token, found wherever it ends a text; else ""."""
        if text not in self._plain:
            return ""
        heads = [text[:k] for k in range(1, len(text))]
        overlaps = any(
            len(other) > len(head) and other.endswith(head)
            for other in self._plain
            for head in heads
        )
        inside = any(text in other for other in self._plain if other != text)
        return "" if overlaps or inside else text

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Returns where special tokens stand in a text, whatever precedes or follows it."""
        found = [] if self._special is None else self._special.finditer(text)
        return [match.span() for match in found if self.plain_end(match.group())]

    def sections(self, text: str) -> list[str]:
        """Returns what stands between the special tokens in a text."""
        if self._special is None or not self._added.may_be_in(text):
            return [text]
        return self._special.split(text)

    def _count_marks(self, before: str, marks: str) -> int:
        number = self._marks.get(before + marks)
        if number is None:
            whole = self._backend.encode(before + marks, add_special_tokens=False)
            number = len(whole) - len(self._backend.encode(before, add_special_tokens=False))
            self._marks[before + marks] = number
        return number

    def is_clean(self, word: str) -> bool:
        """Says whether a blank behind this text is a place to cut."""
        end = word[-1:]
        return not (end in self._unclean_ends or end.isspace() or self._added.ends(word))

    def cut(self, text: str) -> list[str]:
        """Returns the words of a text, cut only where it is allowed; blanks may stay inside."""
        out: list[str] = []
        for piece in _CUT.split(text):
            if out and not self.is_clean(out[-1]) and (len(out) > 1 or out[0]):
                out[-1] += f" {piece}"
            else:
                out.append(piece)
        return out


def _runs(word: str) -> list[str]:
    """Cuts a word in front of the marks at its end, and one of letters and digits between these."""
    core = word.rstrip(_MARKS)
    marks = word[len(core) :]
    if not core or not core.isascii() or not core[-1].isalnum():
        return [word]
    runs = _LETTERS_OR_DIGITS.findall(core) if core.isalnum() else [core]
    return [*runs, marks] if marks else runs


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    if not texts:
        return None
    # There may be thousands: most characters begin none of them.
    first = "".join(sorted({re.escape(text[0]) for text in texts}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, texts))})")


def _joining_marks(content: dict[str, Any]) -> frozenset[str] | None:
    """Returns the marks behind which there is no cut; None where texts cannot be cut at blanks."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if any(" " in token["content"] for token in content["added_tokens"]):
        return None
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    normalizers = _steps(content["normalizer"], "normalizers")
    if steps and steps[-1]["type"] == "ByteLevel":
        return frozenset() if _is_byte_level(steps, normalizers) else None
    return _marks_before_blanks(model["vocab"]) if _marks_blanks(steps, normalizers) else None


def _plain_tokens(added: list[dict[str, Any]]) -> list[str]:
    # They are found before anything else is done to a text, the first and longest first. Where one
    # takes blanks with it, none is treated apart.
    if any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")):
        return []
    texts = [token["content"] for token in added if not token.get("normalized")]
    return sorted(texts, key=len, reverse=True)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _marks_blanks(steps: list[dict[str, Any]], normalizers: list[dict[str, Any]]) -> bool:
    marked = False
    for normalizer in normalizers:
        if normalizer["type"] == "Replace":
            if (normalizer["pattern"], normalizer["content"]) != ({"String": " "}, "▁"):
                return False
            marked = True
        elif (normalizer["type"], normalizer.get("prepend")) != ("Prepend", "▁"):
            return False
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == "▁":
            marked = True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and marked):
            return False
    return marked


def _marks_before_blanks(vocabulary: dict[str, int]) -> frozenset[str] | None:
    # A stretch of unknown characters is one token: a known "▁" ends it.
    if "▁" not in vocabulary:
        return None
    joining = set(_BEFORE_BLANK.findall("\n".join(vocabulary)))
    return (
        None if any(char.isalnum() for char in joining) or len(joining) > 8 else frozenset(joining)
    )


def _is_byte_level(steps: list[dict[str, Any]], normalizers: list[dict[str, Any]]) -> bool:
    # Composed and decomposed forms never reach across a blank: it is a starter that composes with
    # nothing.
    if any(normalizer["type"] not in ("NFC", "NFD") for normalizer in normalizers):
        return False
    last = steps[-1]
    if last["add_prefix_space"] or not all(_only_splits(step) for step in steps[:-1]):
        return False
    expressions = [step for step in steps[:-1] if step["type"] == "Split"]
    return bool(last["use_regex"]) or any(_ends_at_blanks(step) for step in expressions)


def _only_splits(step: dict[str, Any]) -> bool:
    if step["type"] == "Digits":
        return True
    return step["type"] == "Split" and (_ends_at_blanks(step) or _is_digits(step))


def _is_digits(step: dict[str, Any]) -> bool:
    pattern = step["pattern"].get("Regex")
    return pattern in (r"\p{N}{1,3}", r"\p{N}", r"\p{N}+", r"\d", r"\d+", r"[0-9]")


def _ends_at_blanks(step: dict[str, Any]) -> bool:
    pattern = step["pattern"].get("Regex")
    if pattern is None or step["behavior"] != "Isolated" or step["invert"]:
        return False
    found = {part.replace(r"\ ", " ") for part in _alternatives(pattern)}
    # The last two match any blank that is left, so nothing is left unmatched.
    return found <= _ALTERNATIVES and r"\s+" in found


def _alternatives(pattern: str) -> list[str]:
    out, depth, begin = [], 0, 0
    for at, char in enumerate(pattern):
        depth += (char in "([") - (char in ")]")
        if char == "|" and depth == 0:
            out.append(pattern[begin:at])
            begin = at + 1
    return [*out, pattern[begin:]]
