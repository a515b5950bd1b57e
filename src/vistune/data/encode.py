"""A conversation and its images as token ids, loss mask and pixels.

Ids and mask come out of one pass: the template renders segments, each run of text between two
images is tokenised once (as the public models were trained: text between images is tokenised on its
own, and the tokenizer's leading tokens stand once, in front), and a token is a target when any
character it stands for lies in a target segment.

Text that spells a special token ("</s>" in an answer about HTML) becomes that token, as in the
public code; such rows are counted by `vistune data check`. Text that spells the image token is
refused.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.image import ImageLike, ImagePlan, load, probe
from vistune.data.template import ChatTemplate, Segment, load_template
from vistune.errors import DataError, RowError, TemplateError
from vistune.types import EncodedSample, ImageRef, Sample, Turn, VisionGrid

Overlong: TypeAlias = Literal["error", "drop", "truncate_text"]
Size: TypeAlias = tuple[int, int]


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
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    image_starts: tuple[int, ...] = ()
    image_lengths: tuple[int, ...] = ()
    image_order: tuple[int, ...] = ()
    truncated: int = 0

    @property
    def num_image_tokens(self) -> int:
        """Image tokens among the ids."""
        return sum(self.image_lengths)


@dataclass(frozen=True)
class Encoder:
    """Turns samples into numbers; everything it does is said by its fields.

    Args:
        tokenizer: A transformers tokenizer with a fast (Rust) backend.
        template: How conversations are written.
        image_plan: How images are preprocessed.
        grid: How many tokens an image becomes.
        image_token_id: The id that stands for an image's tokens.
        system: System prompt; the template's default when None, none at all when empty.

    Raises:
        TemplateError: The tokenizer cannot say where its tokens stand, or does not hold one of the
            template's markers as one token.
        DataError: Image plan and vision tower disagree on the size.
    """

    tokenizer: Any
    template: ChatTemplate
    image_plan: ImagePlan
    grid: VisionGrid
    image_token_id: int
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise TemplateError(
                "the tokenizer cannot say at which character a token starts, so no exact loss mask"
                " can be made",
                got=type(self.tokenizer).__name__,
                expected="a tokenizer with a fast backend (tokenizer.json or tokenizer.model)",
            )
        for marker in self.template.markers:
            if len(self._backend_ids(marker)) != 1:
                raise TemplateError(
                    f"the template '{self.template.name}' needs {marker!r} as one token, and the"
                    f" tokenizer splits it into {len(self._backend_ids(marker))}",
                    where="data.template",
                    fix="name the template the language model was trained with, or `tokenizer`",
                )
        fixed, side = self.grid.fixed_size_px, self.image_plan.size_px
        if fixed is not None and fixed != side:
            raise DataError(
                "the vision tower takes images of one size only",
                where="data.image.size_px",
                got=side,
                expected=fixed,
                fix="data.image.size_px=auto",
            )

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties hold backend handles; a worker makes its own.
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    # --- public -----------------------------------------------------------------------------

    def count_tokens(self, sample: Sample) -> int:
        """Returns the tokens of a sample before any truncation, from text and image headers.

        Raises:
            RowError: The sample cannot be rendered or an image's header cannot be read.
        """
        return int(self.tokenise(sample).ids.size)

    def tokenise(self, sample: Sample) -> Tokens:
        """Returns ids and mask of a whole sample; of its images only the headers are read.

        Raises:
            RowError: The sample cannot be rendered or an image's header cannot be read.
        """
        try:
            sizes = [probe(image, self.image_plan) for image in sample.images]
            return self.tokenise_turns(sample.turns, sizes)
        except RowError as error:
            raise error.at(_place(sample)) from error

    def encode(
        self,
        sample: Sample,
        *,
        max_tokens: int,
        overlong: Overlong,
        with_pixels: bool = True,
    ) -> EncodedSample:
        """Returns a training sample.

        Args:
            sample: The sample.
            max_tokens: Most tokens it may have.
            overlong: What is done with more: `error` and `drop` raise, `truncate_text` cuts the
                end, never inside an image.
            with_pixels: Decode and preprocess the images.

        Raises:
            RowError: The sample cannot be used; its `reason` says why in one word.
        """
        try:
            if with_pixels:
                images = [load(image, self.image_plan) for image in sample.images]
                sizes = [(image.height, image.width) for image in images]
            else:
                images = []
                sizes = [probe(image, self.image_plan) for image in sample.images]
            tokens = fit(
                self.tokenise_turns(sample.turns, sizes), max_tokens=max_tokens, policy=overlong
            )
        except RowError as error:
            raise error.at(_place(sample)) from error
        pixels = [self.image_plan.apply(images[i]) for i in tokens.image_order if with_pixels]
        return EncodedSample(
            id=sample.id,
            source=sample.source,
            input_ids=tokens.ids,
            target_mask=tokens.mask,
            pixel_values=pixels,
            num_image_tokens=tokens.num_image_tokens,
        )

    def encode_prompt(
        self, turns: Sequence[Turn], images: Sequence[ImageRef | Image.Image] = ()
    ) -> EncodedSample:
        """Returns a conversation that ends with the generation prompt; nothing in it is a target.

        Args:
            turns: The conversation so far; the last turn is the user's.
            images: Images in the order of the indices in `turns`.

        Raises:
            RowError: The conversation cannot be rendered or an image cannot be read.
        """
        loaded = [load(image, self.image_plan) for image in images]
        sizes = [(image.height, image.width) for image in loaded]
        tokens = self.tokenise_turns(turns, sizes, add_generation_prompt=True)
        return EncodedSample(
            id="prompt",
            source="",
            input_ids=tokens.ids,
            target_mask=np.zeros(tokens.ids.size, dtype=np.bool_),
            pixel_values=[self.image_plan.apply(loaded[i]) for i in tokens.image_order],
            num_image_tokens=tokens.num_image_tokens,
        )

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Returns the rendered conversation with this encoder's template and system prompt."""
        return self.template.segments(turns, self.system)

    def special_text(self, turns: Sequence[Turn]) -> list[str]:
        """Returns the special tokens that the conversation's own text spells out."""
        pattern, chars = self._special_pattern, self._special_chars
        if pattern is None or not any(
            char in part
            for turn in turns
            for part in turn.parts
            if type(part) is str
            for char in chars
        ):
            return []
        return [found for turn in turns for found in pattern.findall(turn.text)]

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's, and the tokenizer's end of text."""
        found = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        anchor = self._backend_ids("a")
        for text in self.template.stop:
            ids = self._backend_ids(text)
            behind = self._backend_ids(f"a{text}")
            if len(ids) == 1:
                found.append(ids[0])
            elif behind[:-1] == anchor:  # one token where it does not stand first
                found.append(behind[-1])
        return tuple(dict.fromkeys(found))

    def to_state(self) -> dict[str, Any]:
        """Returns all but the tokenizer, in JSON's types, for a checkpoint."""
        return {
            "template": self.template.model_dump(mode="json"),
            "image_plan": self.image_plan.model_dump(mode="json"),
            "grid": asdict(self.grid),
            "image_token_id": self.image_token_id,
            "system": self.system,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], tokenizer: Any) -> Encoder:
        """Returns the encoder that `to_state` described.

        Args:
            state: What `to_state` returned.
            tokenizer: The tokenizer saved beside it.
        """
        return cls(
            tokenizer=tokenizer,
            template=load_template(state["template"]),
            image_plan=ImagePlan.model_validate(state["image_plan"]),
            grid=VisionGrid(**state["grid"]),
            image_token_id=state["image_token_id"],
            system=state["system"],
        )

    # --- tokens -----------------------------------------------------------------------------

    def tokenise_turns(
        self,
        turns: Sequence[Turn],
        sizes: Sequence[Size],
        *,
        add_generation_prompt: bool = False,
    ) -> Tokens:
        """Returns ids and mask of a conversation whose images' sizes are known.

        Args:
            turns: The conversation.
            sizes: (height, width) of its images, by index.
            add_generation_prompt: End with what precedes an answer.

        Raises:
            RowError: It cannot be rendered, or its text spells the image token.
        """
        segments = self.template.segments(
            turns, self.system, add_generation_prompt=add_generation_prompt
        )
        prefix = self._prefix_ids if self.template.add_bos else ()
        ids = [np.array(prefix, dtype=np.int64)]
        masks = [np.zeros(len(prefix), dtype=np.bool_)]
        starts: list[int] = []
        lengths: list[int] = []
        order: list[int] = []
        position = len(prefix)
        for is_image, run in itertools.groupby(segments, key=lambda s: s.image is not None):
            if not is_image:
                new, mask = self.tokenise_text(list(run))
                ids.append(new)
                masks.append(mask)
                position += new.size
                continue
            for segment in run:
                assert segment.image is not None
                number = self.num_image_tokens(segment.image, sizes)
                starts.append(position)
                lengths.append(number)
                order.append(segment.image)
                ids.append(np.full(number, self.image_token_id, dtype=np.int64))
                masks.append(np.zeros(number, dtype=np.bool_))
                position += number
        return Tokens(
            ids=np.concatenate(ids),
            mask=np.concatenate(masks),
            image_starts=tuple(starts),
            image_lengths=tuple(lengths),
            image_order=tuple(order),
        )

    def num_image_tokens(self, image: int, sizes: Sequence[Size]) -> int:
        """Returns the tokens of an image.

        Args:
            image: Its index in the sample.
            sizes: (height, width) of the sample's images.

        Raises:
            RowError: There is no such image.
        """
        if image >= len(sizes):
            raise RowError(
                f"the text speaks of image {image + 1} of {len(sizes)}",
                reason="image_count_mismatch",
                fix="give as many images as <image> stands in the text",
            )
        return self.grid.num_tokens(*self.image_plan.size_for(*sizes[image]))

    def tokenise_text(
        self, run: Sequence[Segment]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Returns ids and mask of segments of text, which are tokenised as one text.

        Raises:
            RowError: The text spells the image token.
        """
        encoding = self._encode_text("".join(segment.text for segment in run))
        ids = np.array(encoding.ids, dtype=np.int64)
        if (ids == self.image_token_id).any():
            raise RowError(
                "the text spells the image token",
                reason="image_token_in_text",
                got=self.tokenizer.convert_ids_to_tokens(self.image_token_id),
                fix="take it out of the text",
            )
        mask = np.zeros(ids.size, dtype=np.bool_)
        end = 0
        for is_target, group in itertools.groupby(run, key=lambda s: s.is_target):
            start, end = end, end + sum(len(segment.text) for segment in group)
            if is_target:
                first = first_token(encoding, start)
                mask[first : last_token(encoding, end, first)] = True
        return ids, mask

    def _encode_text(self, text: str) -> Any:
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:
            # State that another caller of the same tokenizer left behind.
            backend.no_truncation()
            backend.no_padding()
        return backend.encode(text, add_special_tokens=False)

    def _backend_ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode_text(text).ids
        return ids

    @property
    def num_leading_tokens(self) -> int:
        """Tokens that stand in front of every conversation, before anything the template says."""
        return len(self._prefix_ids) if self.template.add_bos else 0

    @functools.cached_property
    def _prefix_ids(self) -> tuple[int, ...]:
        # What the tokenizer puts in front of a text of its own accord, e.g. its begin-of-text.
        bare = self._backend_ids("a")
        full: list[int] = self.tokenizer.backend_tokenizer.encode("a").ids
        for index in range(len(full) - len(bare) + 1):
            if full[index : index + len(bare)] == bare:
                return tuple(full[:index])
        raise TemplateError(
            "the tokenizer writes a text differently with and without its special tokens"
        )

    @functools.cached_property
    def _special_texts(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts.update(self.tokenizer.all_special_tokens)
        return sorted((text for text in texts if text), key=len, reverse=True)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        texts = self._special_texts
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @functools.cached_property
    def _special_chars(self) -> str:
        # A text with none of these characters spells no special token: mostly "<" alone.
        rest, chars = self._special_texts, ""
        while rest:
            counts = Counter(char for text in rest for char in set(text))
            chars += max(sorted(counts), key=lambda char: counts[char])
            rest = [text for text in rest if chars[-1] not in text]
        return chars


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
        policy: `truncate_text` cuts the end, never inside an image; the others refuse.

    Raises:
        RowError: It is too long, or has no target token (left).
    """
    total = int(tokens.ids.size)
    if total > max_tokens:
        if policy != "truncate_text":
            raise RowError(
                f"{total} tokens ({tokens.num_image_tokens} of them image tokens) are more than one"
                " row holds",
                reason="overlong",
                got=total,
                expected=f"at most {max_tokens} (batch.max_tokens)",
                fix="raise batch.max_tokens, or set data.overlong to drop or truncate_text",
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


def _place(sample: Sample) -> str:
    return f"{sample.where} (id {sample.id})"


__all__ = ["Encoder", "ImageLike", "Overlong", "Tokens", "fit"]
