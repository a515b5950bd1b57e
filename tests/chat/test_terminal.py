"""The terminal loop through pipes: what goes in, what comes out, what ends it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vistune.chat.session import ChatSession
from vistune.chat.terminal import ChatTerminal
from vistune.errors import ImageError, TrainingError
from vistune.types import ImageRef, Turn


class Stub:
    """Answers "A1 好", "A2 好", ... and remembers what it was asked."""

    context_tokens = None

    def __init__(self) -> None:
        self.prompts: list[tuple[Turn, ...]] = []
        self.images: list[tuple[ImageRef, ...]] = []
        self.error: Exception | None = None

    def check_image(self, image: ImageRef) -> None:
        if image.path.stat().st_size < 10:
            raise ImageError("broken", reason="image_broken", where=image.name)

    def num_prompt_tokens(self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...]) -> int:
        return 0

    def stream(
        self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], *, max_new_tokens: int
    ) -> Iterator[str]:
        self.prompts.append(turns)
        self.images.append(images)
        if self.error is not None:
            raise self.error
        yield from (f"A{len(self.prompts)}", " 好")


def talk(*lines: str, stub: Stub | None = None) -> tuple[int, str, str, Stub]:
    stub = stub or Stub()
    out, err = io.StringIO(), io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    code = ChatTerminal(ChatSession(stub), source, out, err).run()
    return code, out.getvalue(), err.getvalue(), stub


def test_one_line_in_one_answer_out() -> None:
    code, out, err, _ = talk("first", "", "  second  ")
    assert (code, out, err) == (0, "A1 好\nA2 好\n", "")


def test_an_answer_gives_the_terminal_no_orders() -> None:
    class Hostile(Stub):
        def stream(
            self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], *, max_new_tokens: int
        ) -> Iterator[str]:
            yield from ("\x1b", "[2J", "wiped\r", "\tand\n好")

    shown = "\\x1b[2Jwiped\\x0d\tand\n好\n"
    code, out, err, _ = talk("first", stub=Hostile())
    assert (code, out, err) == (0, shown, "")
    # The session remembers what was said, not how it was shown.
    session = ChatSession(Hostile())
    assert "".join(session.ask("x")) == "\x1b[2Jwiped\r\tand\n好"


def test_exit_ends_it() -> None:
    code, out, _, stub = talk("first", "/exit", "second")
    assert (code, out, len(stub.prompts)) == (0, "A1 好\n", 1)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_image_by_path_with_spaces(tmp_path: Path, quote: str) -> None:
    path = tmp_path / "a cat.png"
    Image.new("RGB", (4, 4)).save(path)
    code, _, err, stub = talk(f"/image {quote}{path}{quote}", "what?")
    assert (code, err) == (0, "")
    assert stub.images[0][0].path == path.resolve()


def test_errors_do_not_end_the_conversation(tmp_path: Path) -> None:
    broken = tmp_path / "x.png"
    broken.write_bytes(b"?")
    code, out, err, stub = talk(
        "/image", f"/image {broken}", f"/image {tmp_path / 'none.png'}", "/imgae x", "still there?"
    )
    assert code == 1
    assert out == "A1 好\n"
    assert err.count("error:") == 4
    assert "there is no such image file" in err
    assert "unknown command /imgae" in err
    assert stub.images == [()]


def test_a_path_like_question_is_a_question() -> None:
    code, _, _, stub = talk("/etc/passwd is what?")
    assert (code, stub.prompts[0][0].text) == (0, "/etc/passwd is what?")


def test_a_model_error_does_not_end_the_conversation() -> None:
    stub = Stub()
    stub.error = TrainingError("no")
    code, out, err, _ = talk("a", "b", stub=stub)
    assert (code, out) == (1, "")
    assert err.count("error: no") == 2


def test_interrupt_ends_the_answer_only() -> None:
    class Interrupted(Stub):
        def stream(self, turns, images, *, max_new_tokens):  # type: ignore[no-untyped-def]
            yield from super().stream(turns, images, max_new_tokens=max_new_tokens)
            if len(self.prompts) == 1:
                raise KeyboardInterrupt

    code, out, err, stub = talk("a", "b", stub=Interrupted())
    assert code == 0
    assert out == "A1 好\nA2 好\n"
    assert "stopped" in err
    assert len(stub.prompts[1]) == 1


def test_help_and_reset() -> None:
    _, _, err, stub = talk("/help", "a", "/reset", "b")
    assert "/image PATH" in err
    assert len(stub.prompts[1]) == 1
