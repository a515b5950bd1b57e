import pytest

from vistune.data.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\x0dwritten\\x08"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),  # control sequences in one character, and delete
        ("abc\u202ecba", "abc\\u202ecba"),
        ("null\x00", "null\\x00"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    ["plain", "tab\tand\nnewline", "一只猫。\n", "👩‍🚀 é\u0301", "\u00a0\ufffd שלום\u200f!", ""],
)
def test_ordinary_text_is_as_it_was(text: str) -> None:
    assert visible(text) == text
