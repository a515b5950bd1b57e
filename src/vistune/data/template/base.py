"""What every chat template answers: which pieces of text and image a conversation becomes.

A template is pure data. It renders a conversation once, as segments that already know whether the
model must learn them; token ids and loss mask are both made from these segments, so they cannot
disagree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vistune.errors import RowError
from vistune.recipe import Section
from vistune.types import Turn


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the rendered conversation.

    Args:
        text: The text; empty when the segment is an image.
        image: Index of the image among the sample's images, or None.
        is_target: The model must learn to say this.
        is_template: Written by the template, not by the row: role names, separators, end marks.
    """

    text: str = ""
    image: int | None = None
    is_target: bool = False
    is_template: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around turns, where that is the same around every turn.

    Each field is texts in reading order, with whether they are learnt.

    Args:
        first: In front of the first question.
        answer: Between a question and its answer.
        ask: Between an answer and the next question.
        end: Behind the last answer.
    """

    first: tuple[tuple[str, bool], ...]
    answer: tuple[tuple[str, bool], ...]
    ask: tuple[tuple[str, bool], ...]
    end: tuple[tuple[str, bool], ...]


Stretch: TypeAlias = tuple[str, bool] | int
"""Text and whether it is learnt, or the index of an image."""


class ChatTemplate(Section):
    """The form a language model expects conversations in."""

    name: str
    """Name of the template."""
    stop: tuple[str, ...] = ()
    """What ends an answer."""
    markers: tuple[str, ...] = ()
    """Texts that the tokenizer must hold as one token each."""
    add_bos: bool = True
    """Whether the tokenizer's own leading tokens (its begin-of-text, if it adds one) are put in
    front. False where the template writes them itself."""
    both_ways: bool = False
    """Whether the model reads all that stands in front of an answer both ways, as a prefix."""

    @abstractmethod
    def segments(
        self,
        turns: Sequence[Turn],
        system: str | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> list[Segment]:
        """Renders a conversation.

        Args:
            turns: An optional system turn, then user and assistant in turn.
            system: System prompt; a system turn of the conversation goes before it, and the
                template's default is used where there is neither.
            add_generation_prompt: End with what precedes an answer.

        Returns:
            The segments in reading order.

        Raises:
            RowError: The template cannot render this conversation.
        """

    def shown(self, answer: str) -> str:
        """Returns an answer as it is shown and kept in the conversation.

        Args:
            answer: What the model said, without what ended it.
        """
        return answer

    def num_settled(self, answer: str) -> int:
        """Returns how many characters of an unfinished answer can be shown.

        `shown` of so many gives the beginning of `shown` of the whole, whatever comes.

        Args:
            answer: What the model has said so far.
        """
        return len(answer)

    def stretches(self, turns: Sequence[Turn], system: str | None = None) -> list[Stretch]:
        """Renders a conversation as `segments` does, in less time: only what decides its tokens.

        Args:
            turns: As in `segments`.
            system: As in `segments`.

        Returns:
            Texts and images in reading order; texts of one kind may still stand side by side.

        Raises:
            RowError: The template cannot render this conversation.
        """
        return [
            (segment.text, segment.is_target) if segment.image is None else segment.image
            for segment in self.segments(turns, system)
        ]

    def frame(self, system: str | None = None) -> Frame | None:
        """Returns what stands around the turns of a conversation without a system turn.

        Args:
            system: As in `segments`.

        Returns:
            The texts, or None where they depend on more than who speaks. They hold for turns of
            user and assistant in turn whose answers are not empty.
        """
        return None


def split_system(
    turns: Sequence[Turn], system: str | None, default: str | None
) -> tuple[str | None, list[Turn]]:
    """Returns the system prompt in force and the turns without the system turn."""
    rest = list(turns)
    if rest and rest[0].speaker == "system":
        first = rest.pop(0)
        if any(isinstance(part, int) for part in first.parts):
            raise RowError(
                "a system prompt cannot hold an image",
                reason="image_in_system_turn",
                fix="move <image> into a human turn",
            )
        return first.text, rest
    return (default if system is None else system), rest


def check_order(turns: Sequence[Turn]) -> None:
    """Refuses turns that are not user, assistant, user, ... from the first on.

    Raises:
        RowError: Two turns of one speaker follow each other, or an answer comes first.
    """
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn.speaker != expected:
            raise RowError(
                f"turn {index} is not the {expected}'s",
                reason="roles_not_alternating",
                got=turn.speaker,
                expected=expected,
                fix="merge neighbouring turns of one speaker, or drop the row",
            )
        if expected == "user":
            continue
        for part in turn.parts:
            if isinstance(part, int):
                raise RowError(
                    f"turn {index} is an answer and holds an image",
                    reason="image_token_in_answer",
                    fix="take <image> out of the answer",
                )
    if not turns:
        raise RowError("there is no turn", reason="empty_conversation", fix="drop the row")
