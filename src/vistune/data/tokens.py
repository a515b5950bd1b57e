"""A tokenised conversation: where its tokens stand, and how it is made to fit into a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vistune.errors import RowError
from vistune.types import Turn

Overlong: TypeAlias = Literal["error", "drop", "drop_turn", "shrink_image", "truncate_text"]
"""What is done with a row that is too long; see `Encoder.fitted`."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised conversation.

    Args:
        ids: int64 [T].
        mask: bool [T]; True where the token is a target.
        image_starts: First position of every image's run.
        image_lengths: Length of every image's run.
        image_order: Which image of the sample each run stands for.
        truncated: Tokens cut off the end.
        dropped_turns: Turns left out at the end.
        image_scale: What height and width of every image were multiplied with.
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    image_starts: tuple[int, ...] = ()
    image_lengths: tuple[int, ...] = ()
    image_order: tuple[int, ...] = ()
    truncated: int = 0
    dropped_turns: int = 0
    image_scale: float = 1.0

    @property
    def num_image_tokens(self) -> int:
        """Image tokens among the ids."""
        return sum(self.image_lengths)


def first_token(encoding: Any, start: int) -> int:
    """Returns the first token of which a character at or behind `start` is part.

    Args:
        encoding: A `tokenizers.Encoding`; of its tokens only about twenty are looked at.
        start: Index of a character.
    """
    low, high = 0, len(encoding)
    while low < high:
        middle = (low + high) // 2
        begin, stop = encoding.token_to_chars(middle)
        if begin >= start or stop > start:
            high = middle
        else:
            low = middle + 1
    return _behind_blank(encoding, low, start)


def last_token(encoding: Any, end: int, low: int) -> int:
    """Returns one past the last token of which a character before `end` is part.

    Args:
        encoding: A `tokenizers.Encoding`.
        end: One past the index of the last character.
        low: A token that is not behind it.
    """
    high = len(encoding)
    while low < high:
        middle = (low + high) // 2
        if encoding.token_to_chars(middle)[0] >= end:
            high = middle
        else:
            low = middle + 1
    return _behind_blank(encoding, low, end)


def _behind_blank(encoding: Any, token: int, at: int) -> int:
    # Some tokenizers report a token without the blanks it stands for: a token of blanks before
    # `at` is then reported as empty, at `at`. It still belongs to what lies before. (A token that
    # really stands for nothing, such as a blank put in front of a text, begins where the one before
    # it ended, and belongs to what follows.)
    while token < len(encoding) and encoding.token_to_chars(token) == (at, at):
        covered = encoding.token_to_chars(token - 1)[1] if token else 0
        if covered >= at:
            break
        token += 1
    return token


def fit(tokens: Tokens, *, max_tokens: int, policy: Overlong) -> Tokens:
    """Returns tokens that a row can hold and that teach something.

    Args:
        tokens: A tokenised sample.
        max_tokens: Most tokens it may have.
        policy: `truncate_text` cuts the end, never inside an image; the others refuse, because
            what else they do has been done.

    Raises:
        RowError: It is too long, or has no target token (left).
    """
    total = int(tokens.ids.size)
    if total > max_tokens:
        if policy != "truncate_text":
            images = tokens.num_image_tokens
            raise overlong_error(
                total - images, images, num_images=len(tokens.image_order), max_tokens=max_tokens
            )
        tokens = _cut(tokens, max_tokens)
    # The first position of a sample is predicted from nothing, so it cannot be a target.
    if not tokens.mask[1:].any():
        if tokens.truncated:
            raise RowError(
                f"cut to {max_tokens} tokens, no target token is left of {total}",
                reason="overlong_no_target",
                got=total,
                expected=f"at most {max_tokens} (batch.max_tokens)",
                fix="raise batch.max_tokens",
            )
        raise RowError("no token is a target", reason="no_target", fix="give the row an answer")
    return tokens


def turns_that_fit(
    turns: Sequence[Turn], max_tokens: int, count: Callable[[Sequence[Turn]], int]
) -> int:
    """Returns how many of the first turns fit into a row, in whole rounds; 0 when not even one.

    Args:
        turns: A conversation that does not fit as it is.
        max_tokens: Tokens a row holds.
        count: Tokens of the first turns of it.
    """
    first = 1 if turns and turns[0].speaker == "system" else 0
    low, high = 0, (len(turns) - first) // 2  # rounds that fit, rounds that do not
    while high - low > 1:
        middle = (low + high) // 2
        if count(turns[: first + 2 * middle]) <= max_tokens:
            low = middle
        else:
            high = middle
    return first + 2 * low if low else 0


def size_of(image: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns (height, width) of an image of a sample.

    Raises:
        RowError: There is no such image.
    """
    if image >= len(sizes):
        raise RowError(
            f"the text speaks of image {image + 1} of {len(sizes)}",
            reason="image_count_mismatch",
            fix="give as many images as <image> stands in the text",
        )
    return sizes[image]


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Returns (height, width) of an image made smaller; neither falls below a pixel."""
    height, width = size
    return max(1, round(height * scale)), max(1, round(width * scale))


def largest_that_fits(whole: Tokens, max_tokens: int, scaled: Callable[[float], Tokens]) -> Tokens:
    """Returns a sample with its images as large as a row allows, to 1/256 of their sides.

    Args:
        whole: The sample as it is, which does not fit; returned where no scale helps.
        max_tokens: Tokens a row holds.
        scaled: The sample with height and width of every image multiplied.
    """
    best, low, high = whole, 0.0, 1.0  # scales that fit, that do not
    for _ in range(8):
        scale = (low + high) / 2
        tokens = scaled(scale)
        if tokens.ids.size <= max_tokens:
            low, best = scale, replace(tokens, image_scale=scale)
        else:
            high = scale
    return best


def overlong_error(
    text_tokens: int, image_tokens: int, *, num_images: int, max_tokens: int
) -> RowError:
    """Returns the error of a row that is longer than `batch.max_tokens`.

    Args:
        text_tokens: Its tokens of text.
        image_tokens: Its tokens of images.
        num_images: Its images.
        max_tokens: Tokens a row holds.
    """
    images = f"{num_images} image{'s' if num_images > 1 else ''} = {image_tokens:,} + "
    return RowError(
        f"{images if num_images else ''}{text_tokens:,} text tokens > {max_tokens:,}",
        reason="overlong",
        fix="raise batch.max_tokens or shrink images (data.image.size_px; data.image.max_tokens for"
        " models of images of any size); data.overlong=drop, drop_turn or truncate_text goes on"
        " without",
    )


def _cut(tokens: Tokens, max_tokens: int) -> Tokens:
    end = max_tokens
    kept = 0
    for start, length in zip(tokens.image_starts, tokens.image_lengths, strict=True):
        if start + length <= end:
            kept += 1
        elif start < end:
            end = start
    return replace(
        tokens,
        ids=tokens.ids[:end],
        mask=tokens.mask[:end],
        image_starts=tokens.image_starts[:kept],
        image_lengths=tokens.image_lengths[:kept],
        image_order=tokens.image_order[:kept],
        truncated=int(tokens.ids.size) - end,
    )
