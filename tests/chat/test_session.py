"""A conversation's bookkeeping, with a stand-in model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vistune.chat.session import ChatSession
from vistune.errors import DataError, ImageError
from vistune.types import ImageRef, Turn


class Stub:
    """Says what it was asked, token by token (a token is a character here)."""

    def __init__(self, context_tokens: int | None = 1000) -> None:
        self.context_tokens = context_tokens
        self.prompts: list[tuple[Turn, ...]] = []
        self.images: list[tuple[ImageRef, ...]] = []
        self.limits: list[int] = []
        self.error: Exception | None = None

    def check_image(self, image: ImageRef) -> None:
        try:
            with Image.open(image.path) as opened:
                opened.load()
        except OSError as error:
            raise ImageError("broken", reason="image_broken", where=image.name) from error

    def num_prompt_tokens(self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...]) -> int:
        return sum(len(turn.text) for turn in turns) + 10 * len(images)

    def stream(
        self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], *, max_new_tokens: int
    ) -> Iterator[str]:
        self.prompts.append(turns)
        self.images.append(images)
        self.limits.append(max_new_tokens)
        for letter in f"A{len(self.prompts)} 好":
            if self.error is not None:
                raise self.error
            yield letter


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_turns_and_images_accumulate(picture: Path) -> None:
    stub = Stub()
    session = ChatSession(stub, max_new_tokens=7, system="be brief")
    session.add_image(picture)
    assert "".join(session.ask("what?")) == "A1 好"
    assert "".join(session.ask("sure?")) == "A2 好"
    session.add_image(picture)
    list(session.ask("and this?"))
    assert stub.prompts[0] == (Turn("system", ("be brief",)), Turn("user", (0, "\n", "what?")))
    assert stub.prompts[2][1:] == (
        Turn("user", (0, "\n", "what?")),
        Turn("assistant", ("A1 好",)),
        Turn("user", ("sure?",)),
        Turn("assistant", ("A2 好",)),
        Turn("user", (1, "\n", "and this?")),
    )
    assert [len(images) for images in stub.images] == [1, 1, 2]
    assert stub.limits == [7, 7, 7]
    assert stub.images[0][0].path == picture.resolve()


def test_reset_forgets_everything(picture: Path) -> None:
    stub = Stub()
    session = ChatSession(stub)
    session.add_image(picture)
    list(session.ask("a"))
    session.add_image(picture)
    session.reset()
    list(session.ask("b"))
    assert stub.prompts[-1] == (Turn("user", ("b",)),)
    assert stub.images[-1] == ()


def test_an_unusable_image_changes_nothing(tmp_path: Path, picture: Path) -> None:
    session = ChatSession(Stub())
    session.add_image(picture)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    for path in (broken, tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError):
            session.add_image(path)
    assert len(session.images) == 1
    assert session.pending == [0]


def test_a_failed_or_stopped_answer_leaves_the_question_unasked(picture: Path) -> None:
    stub = Stub()
    session = ChatSession(stub)
    session.add_image(picture)
    stub.error = DataError("no")
    with pytest.raises(DataError):
        list(session.ask("a"))
    stub.error = None
    stopped = session.ask("b")
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    assert session.turns == []
    list(session.ask("c"))
    assert stub.prompts[-1] == (Turn("user", (0, "\n", "c")),)


def test_the_context_limits_the_answer_and_then_the_question() -> None:
    stub = Stub(context_tokens=20)
    session = ChatSession(stub, max_new_tokens=15)
    list(session.ask("12345678"))
    assert stub.limits == [12]
    with pytest.raises(DataError, match="has 20 tokens and the model takes 20") as caught:
        list(session.ask("12345678"))
    assert "/reset" in str(caught.value)
    assert len(session.turns) == 2
    session.reset()
    list(session.ask("12345678"))
    assert stub.limits == [12, 12]


def test_a_model_that_names_no_limit() -> None:
    stub = Stub(context_tokens=None)
    list(ChatSession(stub, max_new_tokens=9).ask("x" * 5000))
    assert stub.limits == [9]
