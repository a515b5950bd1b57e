"""Passes of transformers' own vision-language models over made-up rows, to follow their memory.

Every sample of such a row is one image and some text. The model runs as it is written
(`models.shadow`), but for kernels of a device that is not there (`models.stand_ins`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models.alike import Alike, NotAlike, kinds_of
from vistune.models.native.base import GridFamily
from vistune.models.native.contract import LooksAhead
from vistune.models.native.model import NativeVLM
from vistune.models.recompute import decoder_layers, layers_of
from vistune.models.shadow import PassBytes, pass_bytes, shadow_of
from vistune.types import ImageShape

_SIDE = 16
"""Side of a made-up image, in the smallest images, where they have any size."""
_OPENING = 3
_FLAT_NDIM = 2  # patches [P, values]; tiles have channels, rows and columns


@dataclass(frozen=True)
class MadeImage:
    """A made-up image of a model.

    Args:
        pixel_shape: Shape of its pixels.
        shapes: What is said of it.
        num_patches: Patches the tower sees of it.
        num_tokens: Image tokens it becomes.
        kinds: For each block of the tower the number of its kind (`models.alike`); none where all
            of them have to run.
    """

    pixel_shape: tuple[int, ...]
    shapes: tuple[ImageShape, ...]
    num_patches: int
    num_tokens: int
    kinds: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: NativeVLM) -> MadeImage:
        """Makes one and has the model look at it.

        Args:
            model: Of tensors without storage.
        """
        shape, shapes = model.family.blank(model.config)
        if _is_patches(shape, model.grid.patch_px):
            shape = (shape[0] * _SIDE**2, *shape[1:])
            shapes = tuple((*said[:-2], *(_SIDE * n for n in said[-2:])) for said in shapes)

        def look(pixels: Tensor) -> Any:
            images = model.family.image_inputs(pixels, shapes)
            return model.inner.model.get_image_features(**images).pooler_output

        def look_once(pixels: Tensor) -> Any:
            return kinds_of(layers_of(model, "vision"), lambda: look(pixels))

        found, kinds = shadow_of(model, look_once, (torch.empty(shape, device="meta"),))
        num_tokens = sum(part[..., 0].numel() for part in _parts(found))
        return cls(shape, shapes, num_patches(shape, model.grid.patch_px), num_tokens, kinds)


def _parts(value: Any) -> Iterator[Tensor]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def num_patches(pixel_shape: Sequence[int], patch_px: int) -> int:
    """Returns the patches that a row's images were cut into, padding included.

    Args:
        pixel_shape: Of the row's pixels.
        patch_px: Side of a patch.
    """
    if _is_patches(pixel_shape, patch_px):
        return int(pixel_shape[0])
    *lead, _, height, width = pixel_shape
    return int(torch.Size(lead).numel()) * (height // patch_px) * (width // patch_px)


def _is_patches(pixel_shape: Sequence[int], patch_px: int) -> bool:
    flat = len(pixel_shape) == _FLAT_NDIM
    return flat or (len(pixel_shape) == 4 and tuple(pixel_shape[-2:]) == (patch_px, patch_px))


def row_pass(
    model: NativeVLM,
    image: MadeImage,
    *,
    num_samples: int,
    num_text: int,
    dtype: torch.dtype,
    num_layers: int = 0,
) -> PassBytes:
    """Follows a packed row through all of a model but most layers of its decoder.

    Args:
        model: Of tensors without storage, tuned, its modes set.
        image: The image of every sample.
        num_samples: Samples of the row.
        num_text: Tokens of each sample beside its image, one more in every second.
        dtype: Format of the arithmetic.
        num_layers: Layers of the decoder that are there, from the first.
    """
    row = _row(model, image, num_samples=num_samples, num_text=num_text)

    def run(pixels: Tensor) -> Tensor:
        return model.hidden_states(
            **row, pixel_values_NCYX=pixels, image_shapes=image.shapes * num_samples
        )

    first, *rest = image.pixel_shape
    pixels = torch.empty(num_samples * first, *rest, device="meta")
    with _cut(model, num_layers):
        if image.kinds:
            alike = Alike(layers_of(model, "vision"), image.kinds)
            with suppress(NotAlike):
                return pass_bytes(model, run, (pixels,), dtype=dtype, alike=alike)
        return pass_bytes(model, run, (pixels,), dtype=dtype)


def decoder_pass(
    model: NativeVLM,
    image: MadeImage,
    *,
    num_samples: int,
    num_text: int,
    num_layers: int,
    stream: torch.dtype,
    below: bool,
    dtype: torch.dtype,
) -> PassBytes:
    """Follows a packed row of embeddings through the first layers of a model.

    Args:
        model: Of tensors without storage, tuned, its modes set.
        image: The image of every sample.
        num_samples: Samples of the row.
        num_text: Tokens of each sample beside its image, one more in every second.
        num_layers: How many layers.
        stream: Format of the embeddings.
        below: Whether embeddings have a gradient.
        dtype: Format of the arithmetic.
    """
    row = _row(model, image, num_samples=num_samples, num_text=num_text)
    ids_BT = row["input_ids_BT"]
    mask = model.packed_mask(ids_BT, row["cu_seqlens"], row["max_seqlen"], row["prompt_lengths"])

    def run(embeds: Tensor) -> Tensor:
        states: Tensor = model.inner.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=row["position_ids_BT"],
            use_cache=False,
        ).last_hidden_state
        return states

    width = int(model.config.get_text_config().hidden_size)
    embeds = torch.empty(*ids_BT.shape, width, dtype=stream, device="meta", requires_grad=below)
    with _cut(model, num_layers):
        return pass_bytes(model, run, (embeds,), dtype=dtype)


def _row(model: NativeVLM, image: MadeImage, *, num_samples: int, num_text: int) -> dict[str, Any]:
    """Ids, positions and boundaries of such a row.

    Every second sample is a token longer: rows of equal samples are a plain batch on some devices.
    """
    seen = [model.image_token_id] * image.num_tokens
    text = 0 if model.image_token_id else 1
    lengths = [num_text + len(seen) + number % 2 for number in range(num_samples)]
    family = model.family
    both_ways = isinstance(family, LooksAhead) and family.reads_prompts_both_ways
    ids: list[int] = []
    for length in lengths:
        ids += [text] * _OPENING + seen + [text] * (length - len(seen) - _OPENING)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "input_ids_BT": torch.tensor(ids)[None],
        "position_ids_BT": places.expand(3, 1, -1) if isinstance(family, GridFamily) else places,
        "max_seqlen": max(lengths),
        "cu_seqlens": edges.to(torch.int32),
        "prompt_lengths": (_OPENING + len(seen),) * num_samples if both_ways else (),
    }


def head_pass(
    model: NativeVLM, *, num_targets: int, stream: torch.dtype, dtype: torch.dtype
) -> PassBytes:
    """Follows the head and the loss over so many targets.

    Args:
        model: Of tensors without storage, tuned.
        num_targets: How many.
        stream: Format of the hidden states.
        dtype: Format of the arithmetic.
    """
    width = int(model.config.get_text_config().hidden_size)
    ids = torch.zeros(num_targets, dtype=torch.int64)

    def run(hidden_MD: Tensor) -> Tensor:
        logits = model.logits(hidden_MD).float()
        return nn.functional.cross_entropy(logits, ids, reduction="none").sum()

    hidden = torch.empty(num_targets, width, dtype=stream, device="meta", requires_grad=True)
    return pass_bytes(model, run, (hidden,), dtype=dtype)


@contextmanager
def _cut(model: NativeVLM, num_layers: int) -> Iterator[None]:
    """Leaves only the first layers of the decoder in a model."""
    layers = decoder_layers(model)
    name = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == len(layers)
        and all(mine is its for mine, its in zip(layers, module, strict=True))
    )
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    whole = parent.get_submodule(own)
    setattr(parent, own, nn.ModuleList(layers[:num_layers]))
    try:
        yield
    finally:
        setattr(parent, own, whole)
