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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.image import ImageLike, ImagePlan, full_size, load, probe
from vistune.data.layout import ImageLayout, load_layout
from vistune.data.special import SpecialTexts, leading_ids
from vistune.data.template import ChatTemplate, Segment, load_template
from vistune.data.tokens import (
    Overlong,
    Tokens,
    first_token,
    fit,
    largest_that_fits,
    last_token,
    scaled_size,
    size_of,
    turns_that_fit,
)
from vistune.errors import DataError, RowError, TemplateError
from vistune.types import EncodedSample, ImageRef, Sample, Turn, VisionGrid

Size: TypeAlias = tuple[int, int]


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
        layout: How an image becomes tokens and tower inputs, where that is not one square of
            `image_plan`, which then only says how files are read.

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
    layout: ImageLayout | None = None

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
        if self.layout is None and fixed is not None and fixed != side:
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
            overlong: What is done with more: see `fitted`.
            with_pixels: Decode and preprocess the images.

        Raises:
            RowError: The sample cannot be used; its `reason` says why in one word.
        """
        try:
            if with_pixels:
                images = [load(image, self.image_plan) for image in sample.images]
                sizes = [full_size(image) for image in images]
            else:
                images = []
                sizes = [probe(image, self.image_plan) for image in sample.images]
            tokens = self.fitted(sample.turns, sizes, max_tokens=max_tokens, overlong=overlong)
        except RowError as error:
            raise error.at(_place(sample)) from error
        if tokens.image_scale != 1:
            images = [_scaled(image, tokens.image_scale) for image in images]
        return EncodedSample(
            id=sample.id,
            source=sample.source,
            input_ids=tokens.ids,
            target_mask=tokens.mask,
            pixel_values=self._inputs(images, tokens) if with_pixels else [],
            num_image_tokens=tokens.num_image_tokens,
            prompt_tokens=int(tokens.mask.argmax()) if self.template.both_ways else None,
            **self._told(tokens, [scaled_size(size, tokens.image_scale) for size in sizes]),
        )

    def pixels(self, image: Image.Image, *, num_images: int = 1) -> npt.NDArray[np.float32]:
        """Returns the tower's input for a loaded image; see `EncodedSample.pixel_values`.

        Args:
            image: A Pillow image.
            num_images: Images of the sample it belongs to.
        """
        if self.layout is None:
            return self.image_plan.apply(image)
        return self.layout.among(num_images).pixels(image)

    def _inputs(
        self, images: Sequence[Image.Image], tokens: Tokens
    ) -> list[npt.NDArray[np.float32]]:
        order = tokens.image_order
        return [self.pixels(images[i], num_images=len(order)) for i in order]

    @property
    def image_bytes(self) -> int:
        """About how many bytes the tower's input for an image is: float32 in three channels."""
        if self.layout is None:
            return 12 * self.image_plan.size_px**2
        return 4 * self.pixels(Image.new("RGB", (1024, 768))).size

    def pictures(self, image: Image.Image, *, num_images: int = 1) -> list[Image.Image]:
        """Returns what the tower sees of a loaded image of so many, for a person to look at."""
        if self.layout is None:
            return [self.image_plan.to_square(image)]
        return self.layout.among(num_images).pictures(image)

    def _told(self, tokens: Tokens, sizes: Sequence[Size]) -> dict[str, Any]:
        # What a model is told beside ids and pixels: nothing, where every image is one square.
        if self.layout is None:
            return {}
        layout = self.layout.among(len(tokens.image_order))
        shapes = tuple(layout.shape(*sizes[i]) for i in tokens.image_order)
        return {
            "image_shapes": shapes,
            "position_ids": self.layout.positions(tokens.ids, shapes),
        }

    def fitted(
        self, turns: Sequence[Turn], sizes: Sequence[Size], *, max_tokens: int, overlong: Overlong
    ) -> Tokens:
        """Returns ids and mask of a conversation, made to fit into a row.

        Args:
            turns: The conversation.
            sizes: (height, width) of its images, by index.
            max_tokens: Most tokens it may have.
            overlong: What is done with more: `error` and `drop` refuse; `drop_turn` leaves out the
                last rounds, and with them their images; `shrink_image` scales all images down;
                `truncate_text` cuts the end, never inside an image.

        Raises:
            RowError: It cannot be rendered, is too long, or has no target token (left).
            DataError: Images are to be shrunk, and the model takes them in one size only.
        """
        if overlong == "shrink_image":
            self.require_policy(overlong)
        tokens = self.tokenise_turns(turns, sizes)
        if tokens.ids.size > max_tokens:
            if overlong == "drop_turn":
                tokens = self._with_fewer_turns(turns, sizes, max_tokens, tokens)
            elif overlong == "shrink_image":
                tokens = self._with_smaller_images(turns, sizes, max_tokens, tokens)
        kept = fit(tokens, max_tokens=max_tokens, policy=overlong)
        if self.layout is not None and kept.truncated:
            before, after = len(tokens.image_order), len(kept.image_order)
            if self.layout.among(before) != self.layout.among(after):
                raise RowError(  # what was cut off decided how the rest is shown
                    f"cut to {after} of its {before} images, it would be shown in another way",
                    reason="overlong",
                    fix="raise batch.max_tokens, or data.overlong=drop_turn",
                )
        return kept

    def require_policy(self, overlong: Overlong) -> None:
        """Refuses a policy that could have no effect.

        Raises:
            DataError: Images are to be shrunk, and the model brings them to one size anyway.
        """
        # Of one shape: tiles follow an image's shape, and its size only in some models.
        found = {self._image_tokens(side, side) for side in (60, 600, 2400)}
        if overlong == "shrink_image" and len(found) == 1:
            raise DataError(
                f"every {'image' if self.layout is None else 'square image'} becomes"
                f" {found.pop():,} tokens whatever its size, so shrinking it would save nothing",
                where="data.overlong",
                got="shrink_image",
                expected="error, drop, drop_turn or truncate_text",
                fix="data.overlong=drop_turn; or a smaller data.image.max_tokens or size_px, if the"
                " model takes it",
            )

    def _with_fewer_turns(
        self, turns: Sequence[Turn], sizes: Sequence[Size], max_tokens: int, whole: Tokens
    ) -> Tokens:
        def count(kept: Sequence[Turn]) -> int:
            return int(self.tokenise_turns(kept, sizes).ids.size)

        number = turns_that_fit(turns, max_tokens, count)
        if not number:
            return whole
        kept = self.tokenise_turns(turns[:number], sizes)
        return replace(kept, dropped_turns=len(turns) - number)

    def _with_smaller_images(
        self, turns: Sequence[Turn], sizes: Sequence[Size], max_tokens: int, whole: Tokens
    ) -> Tokens:
        def scaled(scale: float) -> Tokens:
            return self.tokenise_turns(turns, [scaled_size(size, scale) for size in sizes])

        return largest_that_fits(whole, max_tokens, scaled)

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
        sizes = [full_size(image) for image in loaded]
        tokens = self.tokenise_turns(turns, sizes, add_generation_prompt=True)
        return EncodedSample(
            id="prompt",
            source="",
            input_ids=tokens.ids,
            target_mask=np.zeros(tokens.ids.size, dtype=np.bool_),
            pixel_values=self._inputs(loaded, tokens),
            num_image_tokens=tokens.num_image_tokens,
            prompt_tokens=int(tokens.ids.size) if self.template.both_ways else None,
            **self._told(tokens, sizes),
        )

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Returns the rendered conversation with this encoder's template and system prompt."""
        return self.template.segments(turns, self.system)

    def special_text(self, text: str) -> list[str]:
        """Returns the special tokens that a text spells out."""
        return self._special.find(text)

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
            "layout": None if self.layout is None else self.layout.model_dump(mode="json"),
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
            layout=None if state.get("layout") is None else load_layout(state["layout"]),
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
        num_images = sum(segment.image is not None for segment in segments)
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
                block = self._block(segment.image, sizes, num_images)
                starts.append(position)
                lengths.append(block.size)
                order.append(segment.image)
                ids.append(block)
                masks.append(np.zeros(block.size, dtype=np.bool_))
                position += block.size
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
        return self._image_tokens(*size_of(image, sizes), len(sizes))

    def _image_tokens(self, height: int, width: int, num_images: int = 1) -> int:
        if self.layout is not None:
            return self.layout.among(num_images).num_tokens(height, width)
        return self.grid.num_tokens(*self.image_plan.size_for(height, width))

    def _block(self, image: int, sizes: Sequence[Size], num_images: int) -> npt.NDArray[np.int64]:
        size = size_of(image, sizes)
        if self.layout is not None:
            return self.layout.among(num_images).block(*size)
        return np.full(self._image_tokens(*size), self.image_token_id, dtype=np.int64)

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
        return leading_ids(self._backend_ids("a"), self.tokenizer.backend_tokenizer.encode("a").ids)

    @functools.cached_property
    def _special(self) -> SpecialTexts:
        return SpecialTexts(self.tokenizer)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    height, width = scaled_size(full_size(image), scale)
    return image.resize((width, height), resample=Image.Resampling.BICUBIC)


def _place(sample: Sample) -> str:
    return f"{sample.where} (id {sample.id})"


__all__ = ["Encoder", "ImageLike", "Overlong", "Size", "Tokens", "fit"]
