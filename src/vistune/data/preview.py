"""What the model is shown and what it must learn to say, for a person to look at.

The pictures as the vision tower gets them, and the conversation token by token with the loss mask.
Both come from the encoder that training uses; nothing is computed a second way. How it looks on a
page is `preview_page`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.encode import Encoder, Overlong, Tokens
from vistune.data.image import ImagePlan, load, probe
from vistune.errors import RowError
from vistune.types import Sample

_BROKEN = "\ufffd"  # what decoding gives for half a character


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A token, or the few tokens that only together make a character.

    Args:
        text: What it stands for.
        ids: Its token ids.
        is_target: Whether the model must learn to say it.
        is_special: Whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    is_target: bool
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class ImagePiece:
    """An image in the conversation.

    Args:
        index: Which of the sample's images.
        num_tokens: Tokens it takes.
    """

    index: int
    num_tokens: int


Piece: TypeAlias = TextPiece | ImagePiece


@dataclass(frozen=True)
class Preview:
    """A sample as the model is shown it.

    Args:
        sample: The sample.
        pieces: The conversation in order.
        images: What the vision tower gets of each of the sample's images, before normalisation:
            one picture, or one for every tile.
        num_tokens: Tokens in all; 0 where no tokenizer is known.
        num_image_tokens: Image tokens among them.
        num_targets: Target tokens among them.
        num_truncated: Tokens that were cut off the end.
        remarks: What a reader should know of this row, by short names.
    """

    sample: Sample
    pieces: tuple[Piece, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    num_tokens: int
    num_image_tokens: int
    num_targets: int
    num_truncated: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def target_text(self) -> str:
        """All that is learnt, as text."""
        return "".join(p.text for p in self.pieces if isinstance(p, TextPiece) and p.is_target)


def preview_sample(
    encoder: Encoder, sample: Sample, *, max_tokens: int, overlong: Overlong
) -> Preview:
    """Returns a sample as the model is shown it.

    Args:
        encoder: The run's encoder.
        sample: The sample.
        max_tokens: Tokens a row holds.
        overlong: What is done with longer ones.

    Raises:
        RowError: The sample would not be trained on; says why.
    """
    try:
        sizes = [probe(image, encoder.image_plan) for image in sample.images]
        tokens = encoder.fitted(sample.turns, sizes, max_tokens=max_tokens, overlong=overlong)
        images = [load(image, encoder.image_plan) for image in sample.images]
    except RowError as error:
        raise error.at(f"{sample.where} (id {sample.id})") from error
    remarks = list(sample.notes)
    if encoder.special_text("\n".join(turn.text for turn in sample.turns)):
        remarks.append("special_token_in_text")
    if tokens.truncated:
        remarks.append("truncated")
    return Preview(
        sample=sample,
        pieces=tuple(_pieces(encoder, tokens)),
        images=tuple(
            tuple(encoder.pictures(image, num_images=len(tokens.image_order))) for image in images
        ),
        num_tokens=int(tokens.ids.size),
        num_image_tokens=tokens.num_image_tokens,
        num_targets=int(tokens.mask[1:].sum()),
        num_truncated=tokens.truncated,
        remarks=tuple(remarks),
    )


def preview_text(sample: Sample, plan: ImagePlan) -> Preview:
    """Returns a sample without tokens, for a dataset that no model is named for.

    Args:
        sample: The sample; its answers are shown as learnt.
        plan: How its images are shown.

    Raises:
        RowError: An image cannot be read.
    """
    try:
        images = [plan.to_square(load(image, plan)) for image in sample.images]
    except RowError as error:
        raise error.at(f"{sample.where} (id {sample.id})") from error
    pieces: list[Piece] = []
    for turn in sample.turns:
        pieces.append(TextPiece(f"{turn.speaker}: ", (), is_target=False, is_special=True))
        for part in turn.parts:
            if isinstance(part, str):
                pieces.append(TextPiece(part, (), is_target=turn.speaker == "assistant"))
            else:
                pieces.append(ImagePiece(part, num_tokens=0))
        pieces.append(TextPiece("\n", (), is_target=False))
    return Preview(
        sample=sample,
        pieces=tuple(pieces),
        images=tuple((image,) for image in images),
        num_tokens=0,
        num_image_tokens=0,
        num_targets=0,
        remarks=sample.notes,
    )


def _pieces(encoder: Encoder, tokens: Tokens) -> Iterator[Piece]:
    at = 0
    runs = zip(tokens.image_starts, tokens.image_lengths, tokens.image_order, strict=True)
    for start, length, index in runs:
        yield from _text(encoder.tokenizer, tokens.ids[at:start], tokens.mask[at:start])
        yield ImagePiece(index=index, num_tokens=length)
        at = start + length
    yield from _text(encoder.tokenizer, tokens.ids[at:], tokens.mask[at:])


def _text(
    tokenizer: Any, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]
) -> Iterator[TextPiece]:
    # Decoders drop a blank in front of a text; behind another token they keep it.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    lead = len(_decode(tokenizer, anchor))
    special = set(tokenizer.all_special_ids)
    group: list[int] = []
    pairs = list(zip(ids.tolist(), mask.tolist(), strict=True))
    for k, (id, is_target) in enumerate(pairs):
        group.append(id)
        text = _decode(tokenizer, [*anchor, *group])[lead:]
        last = k + 1 == len(pairs) or pairs[k + 1][1] != is_target or pairs[k + 1][0] in special
        if text.endswith(_BROKEN) and len(group) < 8 and not last:
            continue  # half a character: the next token ends it
        yield TextPiece(text, tuple(group), is_target, id in special)
        group = []


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
