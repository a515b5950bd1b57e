"""Decoding: a batch of prompts, padded on the left, answered token by token with a cache.

Greedy unless a temperature is given. A prompt's answer does not depend on what else is in the
batch (up to the rounding of other kernel shapes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vistune import _compat
from vistune.data.collate import stack_pixels
from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.types import EncodedSample, ImageRef, ImageShape, Turn

_REPLACEMENT = "\ufffd"  # what half a character decodes to


class AnsweringModel(Protocol):
    """What decoding needs of a model: the forward pass and generation hooks of transformers."""

    training: bool

    def __call__(self, **inputs: Any) -> Any:
        """Returns logits [B, 1, V] and the cache."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the weights."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switches between training and evaluation."""
        ...


class LaidOutModel(Protocol):
    """What decoding needs besides where an image layout makes the images' tokens."""

    def generation_inputs(
        self,
        *,
        input_ids_BT: Tensor,
        pixel_values: Tensor | None,
        image_shapes: tuple[ImageShape, ...],
    ) -> dict[str, Any]:
        """Returns what the forward pass is given for the images of a batch of prompts."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Args:
        turns: The conversation; the last turn is the user's.
        images: Images in the order of the indices in `turns`.
    """

    turns: Sequence[Turn]
    images: Sequence[ImageRef | Image.Image] = ()


@dataclass(frozen=True)
class _Choice:
    """How the next token is chosen."""

    temperature: float
    top_p: float
    generator: torch.Generator | None
    forbidden: Tensor | None

    def pick(self, logits_BV: Tensor) -> Tensor:
        """Returns int64 [B]."""
        scores_BV = logits_BV.float()
        if self.forbidden is not None:
            scores_BV = scores_BV.index_fill(-1, self.forbidden, float("-inf"))
        if self.temperature == 0.0:
            return scores_BV.argmax(-1)
        chances_BV = torch.softmax(scores_BV / self.temperature, dim=-1)
        if self.top_p < 1.0:
            ranked_BV, order_BV = chances_BV.sort(dim=-1, descending=True)
            # A token stays while those before it hold less than top_p, so at least one stays.
            ranked_BV[ranked_BV.cumsum(-1) - ranked_BV >= self.top_p] = 0.0
            chances_BV = torch.zeros_like(chances_BV).scatter(-1, order_BV, ranked_BV)
        return torch.multinomial(chances_BV, 1, generator=self.generator)[:, 0]


@torch.no_grad()
def generate(
    model: AnsweringModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> list[str]:
    """Answers prompts in one batch.

    Args:
        model: The model, on its device; its training mode is left as it was.
        encoder: How prompts become tokens.
        prompts: The prompts.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy decoding; above, the scale of sampling.
        top_p: Sampling keeps the likeliest tokens that together hold this probability.
        stop: Texts that end an answer, besides the template's and the tokenizer's own.
        seed: Seed of sampling.

    Returns:
        One answer per prompt, without special tokens and without what ended it.

    Raises:
        RowError: A prompt cannot be rendered, or an image cannot be read.
    """
    if not prompts:
        return []
    encoded = [encoder.encode_prompt(prompt.turns, prompt.images) for prompt in prompts]
    reader = _Reader(encoder, stop)
    kept: list[list[int]] = [[] for _ in encoded]
    steps = _steps(
        model,
        encoder,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    open_rows = set(range(len(encoded)))
    with contextlib.closing(steps):
        for next_ids in steps:
            for index in sorted(open_rows):
                if next_ids[index] in reader.stop_ids:
                    open_rows.discard(index)
                    continue
                kept[index].append(next_ids[index])
                if reader.is_stopped(kept[index]):
                    open_rows.discard(index)
            if not open_rows:
                break
    return [encoder.template.shown(reader.text(ids)[0]) for ids in kept]


@torch.no_grad()
def stream(
    model: AnsweringModel,
    encoder: Encoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """Answers one prompt piece by piece; the pieces joined are what `generate` returns.

    Args:
        model: The model, on its device.
        encoder: How prompts become tokens.
        prompt: The prompt.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy decoding.
        top_p: Sampling keeps the likeliest tokens that together hold this probability.
        stop: Texts that end an answer, besides the template's and the tokenizer's own.
        seed: Seed of sampling.

    Yields:
        Text that will not change any more.
    """
    encoded = encoder.encode_prompt(prompt.turns, prompt.images)
    reader = _Reader(encoder, stop)
    kept: list[int] = []
    told = 0
    steps = _steps(
        model,
        encoder,
        [encoded],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    with contextlib.closing(steps):
        for (next_id,) in steps:
            if next_id in reader.stop_ids:
                break
            kept.append(next_id)
            text, stopped = reader.text(kept)
            if stopped:
                break
            text = text[: reader.settled(text)]
            shown = encoder.template.shown(text[: encoder.template.num_settled(text)])
            if len(shown) > told:
                yield shown[told:]
                told = len(shown)
    shown = encoder.template.shown(reader.text(kept)[0])
    if len(shown) > told:
        yield shown[told:]


class _Reader:
    """Turns answer ids into text and knows what ends an answer."""

    def __init__(self, encoder: Encoder, stop: Sequence[str]) -> None:
        self._tokenizer = encoder.tokenizer
        self.stop_ids = frozenset(encoder.stop_token_ids)
        special = set(self._tokenizer.all_special_tokens)
        # A stop text may come out glued to other characters in one token, so it is also looked for
        # in the text. Special tokens never show there.
        texts = (*encoder.template.stop, *stop)
        self._stops = tuple(dict.fromkeys(t for t in texts if t and t not in special))

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Returns the answer so far, cut at a stop text, and whether there was one."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        found = [text.find(stop) for stop in self._stops if stop in text]
        return (text[: min(found)], True) if found else (text, False)

    def is_stopped(self, ids: Sequence[int]) -> bool:
        """Whether the answer holds a stop text."""
        return bool(self._stops) and self.text(ids)[1]

    def settled(self, text: str) -> int:
        """Returns how many characters can be shown: no half character, no beginning of a stop."""
        end = len(text.rstrip(_REPLACEMENT))
        for stop in self._stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return end


def _steps(
    model: AnsweringModel,
    encoder: Encoder,
    encoded: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Generator[list[int], None, None]:
    """Yields the next token of every row, finished or not, until it is closed."""
    first = next(model.parameters())
    device = first.device
    ids_BT, mask_BT = _left_padded([sample.input_ids for sample in encoded], device)
    pixel_values = stack_pixels(encoded)
    pixel_values = None if pixel_values is None else pixel_values.to(device)
    shapes = tuple(shape for sample in encoded for shape in sample.image_shapes)
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    if shapes or encoder.template.both_ways:
        inputs = cast(LaidOutModel, model).generation_inputs(
            input_ids_BT=ids_BT, pixel_values=pixel_values, image_shapes=shapes
        )
    decoding = _compat.Decoding(
        model, input_ids_BT=ids_BT, attention_mask_BT=mask_BT, image_inputs=inputs
    )
    choice: _Choice | None = None
    training = model.training
    model.train(False)
    try:
        for _ in range(max_new_tokens):
            with one_dtype(model, device):
                out = model(**decoding.inputs())
            logits_BV = out.logits[:, -1]
            if out.past_key_values is None:
                raise ModelError(f"{type(model).__name__} returns no cache to decode with")
            if choice is None:
                choice = _choice(encoder, logits_BV, temperature, top_p, seed)
            next_B = choice.pick(logits_BV)
            yield next_B.tolist()
            decoding.advance(out, next_B)
    finally:
        model.train(training)


def _choice(
    encoder: Encoder, logits_BV: Tensor, temperature: float, top_p: float, seed: int | None
) -> _Choice:
    device = logits_BV.device
    generator = None
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
    # The image token stands for pixels; it is never an answer.
    inside = encoder.image_token_id < logits_BV.shape[-1]
    forbidden = torch.tensor([encoder.image_token_id], device=device) if inside else None
    return _Choice(temperature, top_p, generator, forbidden)


def _left_padded(
    rows: Sequence[np.ndarray[Any, np.dtype[np.int64]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns ids and mask, both int64 [B, T]; what the pad id is does not matter."""
    length = max(row.size for row in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids_BT[index, length - row.size :] = torch.from_numpy(row)
        mask_BT[index, length - row.size :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def one_dtype(
    model: AnsweringModel, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Lets a model in training (fp32 beside frozen 16 bit) compute in the narrower format."""
    dtypes = {p.dtype for p in model.parameters()} - {torch.float32}
    half = dtypes & {torch.bfloat16, torch.float16}
    mixed = any(p.dtype is torch.float32 for p in model.parameters())
    if half and mixed and not torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, dtype=half.pop())
    return contextlib.nullcontext()
