"""Reads rows one after another and writes down what is to be known of each.

A row is read, its images' headers are looked at, its tokens are counted. What would stop it in
training stops it here, with the same words.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vistune.data.count import TokenCounter
from vistune.data.encode import Encoder
from vistune.data.formats import RowReader
from vistune.data.headers import Sizes
from vistune.data.image import load
from vistune.data.index.columns import SCRIPTS, Draft, SourceIndex
from vistune.data.rejects import reject
from vistune.errors import DataError, RowError
from vistune.types import ImageRef, Sample

_PROOF_EVERY_ROWS = 512
"""One row in so many is tokenised as well: counting must give the same."""
_LONG_ANSWER_CHARS = 240
_ENDINGS = frozenset(".!?。！？…\"'”’)]}）」』】>*`|~:：;；,\n$%")
_SCRIPT_CHARS = {
    "japanese": re.compile("[\u3040-\u30ff]"),
    "korean": re.compile("[\uac00-\ud7af]"),
    "chinese": re.compile("[\u3400-\u9fff]"),
    "cyrillic": re.compile("[\u0400-\u04ff]"),
    "arabic": re.compile("[\u0600-\u06ff]"),
}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


@dataclass
class RowScan:
    """Scans rows of one source.

    Args:
        reader: The source.
        encoder: How rows become tokens.
        deep: Decode every image.
    """

    reader: RowReader
    encoder: Encoder
    deep: bool = False

    def __post_init__(self) -> None:
        self._counter: TokenCounter | None = None
        self._sizes = Sizes(self.encoder.image_plan)

    def rows(self, rows: Iterable[int], *, alive: Callable[[], None] | None = None) -> SourceIndex:
        """Returns the index of some rows.

        Args:
            rows: Their numbers.
            alive: Called every few rows.

        Raises:
            DataError: Counting and tokenising disagree, which is a bug.
        """
        if self._counter is None:
            self._counter = TokenCounter(self.encoder)  # learnt where it is used
        draft, before = Draft(), self._counter.num_tokenised
        collecting = gc.isenabled()
        gc.disable()  # nothing here makes cycles; looking for them costs a third of the time
        try:
            for number, row in enumerate(rows):
                if alive is not None and number % 64 == 0:
                    alive()
                self._row(draft, number, row, self._counter)
        finally:
            if collecting:
                gc.enable()
        return draft.index(num_tokenised=self._counter.num_tokenised - before)

    def _row(self, draft: Draft, number: int, row: int, counter: TokenCounter) -> None:
        sample: Sample | None = None
        try:
            sample = self.reader.read(row)
            self._usable(draft, row, sample, counter)
        except RowError as error:
            id = None if sample is None else sample.id
            name, where = self.reader.name, self.reader.where(row)
            draft.rejected[number] = reject(error, source=name, where=where, id=id)
            id_hash = 0 if id is None else hash64(id.encode("utf-8", "surrogatepass"))
            draft.values.append((0, 0, 0, 0, 0, 0, id_hash, 0))
            draft.num_images.append(0)

    def _usable(self, draft: Draft, row: int, sample: Sample, counter: TokenCounter) -> None:
        try:
            sizes = [self._sizes.of(image) for image in sample.images]
            counts = counter.count(sample.turns, sizes)
            if row % _PROOF_EVERY_ROWS == 0:
                self._prove(sample, sizes, counts.tokens, counts.target_tokens)
            if not counts.target_tokens:
                raise RowError(
                    "no token is a target", reason="no_target", fix="give the row an answer"
                )
            hashes = [self._look(image) for image in sample.images] if self.deep else []
        except RowError as error:
            raise error.at(f"{sample.where} (id {sample.id})") from error
        notes = list(sample.notes)
        texts = [turn.text for turn in sample.turns]
        text = "\n".join(texts)
        if self.encoder.special_text(text):
            notes.append("special_token_in_text")
        if seems_cut_off(texts[-1]):
            notes.append("answer_seems_cut_off")
        draft.values.append(
            (
                1,
                draft.bits(notes) if notes else 0,
                script_of(text),
                counts.text_tokens,
                counts.image_tokens,
                counts.target_tokens,
                hash64(sample.id.encode("utf-8", "surrogatepass")),
                content_hash(sample, text),
            )
        )
        draft.num_images.append(len(sizes))
        draft.sizes += sizes
        if self.deep:
            draft.image_names += [hash64(content_name(image)) for image in sample.images]
            draft.image_hashes += hashes

    def _prove(
        self, sample: Sample, sizes: list[tuple[int, int]], tokens: int, targets: int
    ) -> None:
        exact = self.encoder.tokenise_turns(sample.turns, sizes)
        found = int(exact.ids.size), int(exact.mask[1:].sum())
        if found != (tokens, targets):
            raise DataError(
                "counting a row's tokens gave another number than tokenising it",
                where=f"{sample.where} (id {sample.id})",
                got=f"{tokens} tokens, {targets} of them targets",
                expected=f"{found[0]}, {found[1]}",
                fix="report this as a bug, with the row and the tokenizer",
            )

    def _look(self, image: ImageRef) -> int:
        return look_of(load(image, self.encoder.image_plan))


def look_of(image: Image.Image) -> int:
    """Returns 64 bits that are equal for images that look alike: which of two neighbours is darker.

    Args:
        image: An image in mode RGB. Other sizes, qualities and formats of it give the same bits
            but for a few.
    """
    grey = image.convert("L").resize((9, 8), resample=Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int16)
    bits = (pixels[:, 1:] - pixels[:, :-1] > 1).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def content_name(image: ImageRef) -> bytes:
    """Returns what tells the file of an image from other files."""
    if image.content is not None:
        return image.content
    name = os.fsencode(image.path)
    return name if image.span is None else name + repr(image.span).encode()


def content_hash(sample: Sample, text: str) -> int:
    """Returns 64 bits that are equal for equal conversations about the same image names.

    Args:
        sample: A row.
        text: Its turns' texts, a line each.
    """
    names = "\0".join([image.name for image in sample.images])
    return hash64(f"{names}\0{text}".encode("utf-8", "surrogatepass"))


def hash64(content: bytes) -> int:
    """Returns 64 bits that are equal for equal content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def seems_cut_off(answer: str) -> bool:
    """Says whether an answer is long and stops without any mark. Short ones often have none."""
    return len(answer) > _LONG_ANSWER_CHARS and answer.rstrip()[-1:] not in _ENDINGS


def script_of(text: str) -> int:
    """Returns the number in `SCRIPTS` of the script that most of a text is written in."""
    if text.isascii():
        return 1 if _LATIN.search(text) else 0
    letters = {name: len(chars.findall(text)) for name, chars in _SCRIPT_CHARS.items()}
    # Japanese is written with Chinese characters too; kana decide. A Chinese character stands for
    # about a word of Latin letters.
    if letters["japanese"]:
        letters["japanese"] += letters["chinese"]
        letters["chinese"] = 0
    letters["latin"] = len(_LATIN.findall(text)) // 4
    letters["other"] = sum(map(str.isalpha, text)) // 4 - sum(letters.values())
    best = max(letters, key=lambda name: letters[name])
    return SCRIPTS.index(best) if letters[best] > 0 else 0


__all__ = [
    "RowScan",
    "content_hash",
    "content_name",
    "hash64",
    "look_of",
    "script_of",
    "seems_cut_off",
]
