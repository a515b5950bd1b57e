"""Text of a model or a dataset, made safe to print: control characters are shown, not obeyed.

A terminal takes commands from the text it prints: an answer could clear the screen, change the
window's title or write over what stands above it.
"""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
# They turn the direction of what is behind them, so that a line reads as another one.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    r"""Returns a text in which control characters other than tab and newline are written out.

    Args:
        text: Any text, or a piece of one: every character is looked at alone.

    Returns:
        The text with such a character as `\x1b` or `\u202e`; ordinary text is unchanged.
    """
    if text.isprintable():
        return text
    return "".join(_written_out(character) if _acts(character) else character for character in text)


def _acts(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in _KEPT
    return control or character in _TURNING


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
