"""What a row of one of transformers' own models needs for each of its units, by following passes.

Passes over few images and through few layers (`models.native_passes`) are compared; what a unit
needs is the difference, so that weights and what is made of them drop out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vistune.models.native.contract import LooksAhead
from vistune.models.native.model import NativeVLM
from vistune.models.native_passes import MadeImage, decoder_pass, row_pass
from vistune.models.shadow import PassBytes
from vistune.recipe import TuneConfig

_TEXT_TOKENS = (32, 1056)
_IMAGES = (2, 4, 6)
_LONG_SAMPLE = 1024
_ATTEND_OVER_ALL = frozenset({"pixtral"})
"""Towers that hide images from each other by a mask over all pairs of a row's patches."""


@dataclass(frozen=True)
class Amounts:
    """Bytes for each unit.

    Args:
        kept: Alive when the forward pass has ended.
        forward: Most in a forward pass.
        backward: Most in a backward pass.
    """

    kept: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def times(self, number: float) -> Amounts:
        """Returns the bytes of so many units."""
        return Amounts(self.kept * number, self.forward * number, self.backward * number)

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.kept + other.kept, self.forward + other.forward, self.backward + other.backward
        )

    def __sub__(self, other: Amounts) -> Amounts:
        return self + other.times(-1)


def outside_amounts(
    model: NativeVLM, image: MadeImage, *, dtype: torch.dtype
) -> tuple[Amounts, Amounts, Amounts]:
    """Follows rows through a model without layers.

    Args:
        model: Of tensors without storage, tuned, its modes set.
        image: The image of every sample.
        dtype: Format of the arithmetic.

    Returns:
        Bytes for each token, for each patch, and for each pair of patches.
    """

    def run(num_samples: int, num_text: int = _TEXT_TOKENS[0]) -> Amounts:
        return _amounts(
            row_pass(model, image, num_samples=num_samples, num_text=num_text, dtype=dtype)
        )

    few, some = (run(number) for number in _IMAGES[:2])
    longer = run(_IMAGES[0], _TEXT_TOKENS[1])
    text = (longer - few).times(1 / (_IMAGES[0] * (_TEXT_TOKENS[1] - _TEXT_TOKENS[0])))
    step, patches = _IMAGES[1] - _IMAGES[0], image.num_patches
    bend = Amounts()
    if model.config.vision_config.model_type in _ATTEND_OVER_ALL:
        bend = (run(_IMAGES[2]) - some - (some - few)).times(1 / 2 / step**2)
    # Of c + a n + b n^2: what is not the square's, at these numbers.
    grown = some - few - bend.times(_IMAGES[1] ** 2 - _IMAGES[0] ** 2)
    grown -= text.times(_num_tokens(image, _IMAGES[1]) - _num_tokens(image, _IMAGES[0]))
    pixels = 4.0 * step * torch.Size(image.pixel_shape).numel()
    patch = (grown + Amounts(pixels, pixels, pixels)).times(1 / (step * patches))
    return text, patch, bend.times(1 / patches**2)


def _num_tokens(image: MadeImage, num_samples: int, num_text: int = _TEXT_TOKENS[0]) -> int:
    """Returns the tokens of a made-up row, of which every second sample is one longer."""
    return num_samples * (image.num_tokens + num_text) + num_samples // 2


def _amounts(found: PassBytes) -> Amounts:
    return Amounts(found.kept, found.forward, found.backward)


def added_bytes(model: NativeVLM, image: MadeImage, layer: Amounts, *, dtype: torch.dtype) -> float:
    """Returns what is kept for each patch where a tower adds to the first layers' results.

    Args:
        model: See `outside_amounts`.
        image: See `outside_amounts`.
        layer: What a layer keeps without that.
        dtype: Format of the arithmetic.
    """
    depth = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
    if not depth:
        return 0.0
    numbers, kept = _IMAGES[:2], []
    for num_layers in (0, depth):
        few, some = (
            row_pass(
                model,
                image,
                num_samples=number,
                num_text=_TEXT_TOKENS[0],
                num_layers=num_layers,
                dtype=dtype,
            ).kept
            for number in numbers
        )
        kept.append(some - few)
    tokens = _num_tokens(image, numbers[1]) - _num_tokens(image, numbers[0])
    added = kept[1] - kept[0] - depth * tokens * layer.kept
    return float(added / (numbers[1] - numbers[0]) / image.num_patches)


def layer_amounts(
    model: NativeVLM, image: MadeImage, *, tune: TuneConfig, dtype: torch.dtype
) -> tuple[Amounts, Amounts]:
    """Follows rows of two lengths through one layer and through two.

    Args:
        model: See `outside_amounts`.
        image: See `outside_amounts`.
        tune: What trains.
        dtype: Format of the arithmetic.

    Returns:
        Bytes for each token, and for each pair of tokens of a sample.
    """
    if not isinstance(model.family, LooksAhead):
        num_text = max(_TEXT_TOKENS[0], _LONG_SAMPLE - image.num_tokens)
        found = _each_token(model, image, num_text, num_samples=2, tune=tune, dtype=dtype)
        return found, Amounts()
    # Many tokens either way, or what is made of weights on the way hides what tokens need.
    short, long = (
        _each_token(model, image, num_text, num_samples=number, tune=tune, dtype=dtype)
        for num_text, number in zip(_TEXT_TOKENS, (8, 2), strict=True)
    )
    pair = (long - short).times(1 / (_TEXT_TOKENS[1] - _TEXT_TOKENS[0]))
    return short - pair.times(image.num_tokens + _TEXT_TOKENS[0]), pair


def _each_token(
    model: NativeVLM,
    image: MadeImage,
    num_text: int,
    *,
    num_samples: int,
    tune: TuneConfig,
    dtype: torch.dtype,
) -> Amounts:
    """Follows rows of samples of one length, and twice as many, through one layer and two."""
    below = tune.connector.mode == "full" or tune.vision.mode != "freeze"
    full = tune.language.mode == "full"

    def run(number: int, num_layers: int) -> Amounts:
        return _amounts(
            decoder_pass(
                model,
                image,
                num_samples=number,
                num_text=num_text,
                num_layers=num_layers,
                stream=torch.float32 if full else dtype,
                below=below or full,
                dtype=dtype,
            )
        )

    one, two, one_long, two_long = (
        run(n, depth) for n in (num_samples, 2 * num_samples) for depth in (1, 2)
    )
    grown, kept = two_long - two, (two_long.kept - one_long.kept) - (two.kept - one.kept)
    beyond = Amounts(kept, grown.forward - grown.kept, grown.backward - grown.kept)
    few, many = (_num_tokens(image, n, num_text) for n in (num_samples, 2 * num_samples))
    return beyond.times(1 / (many - few))
