"""One conversation: its turns and images, and the answers streamed into it. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vistune.errors import DataError, ImageError
from vistune.types import ImageRef, Part, Turn


class Speaking(Protocol):
    """A model that can take part in a conversation."""

    @property
    def context_tokens(self) -> int | None:
        """Tokens the model was built for, prompt and answer together; None when it says nothing."""
        ...

    def check_image(self, image: ImageRef) -> None:
        """Raises ImageError when the image cannot be used."""
        ...

    def num_prompt_tokens(self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...]) -> int:
        """Returns the length of the prompt, image tokens included."""
        ...

    def stream(
        self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], *, max_new_tokens: int
    ) -> Iterator[str]:
        """Yields the answer piece by piece."""
        ...


@dataclass
class ChatSession:
    """A conversation with one model.

    Args:
        model: Who answers.
        max_new_tokens: Longest answer.
        system: System prompt; the template's own when None.
    """

    model: Speaking
    max_new_tokens: int = 256
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def add_image(self, path: str | Path) -> ImageRef:
        """Takes an image into the next question.

        Raises:
            ImageError: It is not there or cannot be read; the conversation stays as it was.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise ImageError(
                "there is no such image file",
                reason="image_missing",
                where=str(path),
                fix="give the path of an image file",
            )
        image = ImageRef(file.resolve(), str(path))
        self.model.check_image(image)
        self.images.append(image)
        self.pending.append(len(self.images) - 1)
        return image

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.turns.clear()
        self.images.clear()
        self.pending.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Asks a question and yields the answer piece by piece.

        The turn counts only when its answer is complete: after an error, or when the caller stops
        reading, the conversation is as it was before the question, its images still waiting.

        Raises:
            DataError: The conversation no longer fits the model.
        """
        parts: list[Part] = []
        for index in self.pending:
            parts += [index, "\n"]
        parts.append(text)
        asked = (*self.turns, Turn("user", tuple(parts)))
        opening = (Turn("system", (self.system,)),) if self.system is not None else ()
        prompt, images = (*opening, *asked), tuple(self.images)
        room = self._room(prompt, images)
        answer: list[str] = []
        for piece in self.model.stream(prompt, images, max_new_tokens=room):
            answer.append(piece)
            yield piece
        self.turns = [*asked, Turn("assistant", ("".join(answer),))]
        self.pending = []

    def _room(self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...]) -> int:
        """Returns how long the answer may be."""
        limit = self.model.context_tokens
        if limit is None:
            return self.max_new_tokens
        used = self.model.num_prompt_tokens(turns, images)
        if used >= limit:
            raise DataError(
                f"the conversation has {used} tokens and the model takes {limit}",
                expected=f"fewer than {limit} tokens, so that an answer fits",
                fix="start afresh with /reset, or ask a shorter question",
            )
        return min(self.max_new_tokens, limit - used)
