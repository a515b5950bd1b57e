"""The special tokens of a tokenizer: in text that should not spell them, and in front of any."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from vistune.errors import TemplateError


class SpecialTexts:
    """Finds special tokens that a text spells out.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts.update(tokenizer.all_special_tokens)
        ordered = sorted((text for text in texts if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._chars = _telling_chars(ordered)

    def find(self, text: str) -> list[str]:
        """Returns the special tokens in a text, in order."""
        if self._pattern is None or not any(char in text for char in self._chars):
            return []
        found: list[str] = self._pattern.findall(text)
        return found


def _telling_chars(texts: list[str]) -> str:
    """Returns characters of which every text holds one: mostly "<" alone."""
    rest, chars = texts, ""
    while rest:
        counts = Counter(char for text in rest for char in set(text))
        chars += max(sorted(counts), key=lambda char: counts[char])
        rest = [text for text in rest if chars[-1] not in text]
    return chars


def leading_ids(bare: list[int], full: list[int]) -> tuple[int, ...]:
    """Returns what a tokenizer puts in front of a text of its own accord (its begin-of-text).

    Args:
        bare: A text's ids without special tokens.
        full: The same text's ids with them.

    Raises:
        TemplateError: The one is not part of the other.
    """
    for index in range(len(full) - len(bare) + 1):
        if full[index : index + len(bare)] == bare:
            return tuple(full[:index])
    raise TemplateError(
        "the tokenizer writes a text differently with and without its special tokens"
    )
