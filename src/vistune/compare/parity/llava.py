"""LLaVA-1.5: pictures, tower, projector, splicing, and logits, loss and gradients by case.

The config nests the parts: the language model's settings under `text`, CLIP's under
`vision_tower`. A case is a prefix of array names (`main.input_ids`); what a case was run with
(`padding_side`, `tokenizer_model_max_length`) stands in the config under `cases`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from vistune.checkpoint.layouts.llava_original import from_composed, to_composed
from vistune.checkpoint.layouts.names import fill_model
from vistune.compare.parity.ledger import Ledger
from vistune.compare.parity.pictures import PLACEHOLDER, Spliced, prepared, spliced
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.families.files import read_tensors
from vistune.models.towers.families import plan_tower, tower_features
from vistune.types import IGNORE_INDEX

NAME = "llava"


def matches(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether a directory holds a LLaVA with its tower inside."""
    projector = any(key.startswith("model.mm_projector.") for key in keys)
    tower = any(key.startswith("model.vision_tower.vision_tower.") for key in keys)
    parts = all(isinstance(config.get(name), Mapping) for name in ("text", "vision_tower"))
    return projector and tower and parts and "model.vlm_uni_query_projector.0.weight" not in keys


def compare(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    """Compares one file; see `Case`."""
    model = _load(directory, config, ledger.dtype)
    _pictures(config, ledger)
    if "images_pad" not in ledger:
        return
    images = ledger.take("images_pad")
    with torch.no_grad():
        features = tower_features(model.vision_tower, model.plan, images)
        ledger.compare("vision_features", features)
        ledger.compare("projected", model.image_features(images))
    cases = [name.removesuffix(".input_ids") for name in ledger.arrays if "." in name]
    for case in dict.fromkeys(c for c in cases if f"{c}.input_ids" in ledger):
        _case(model, config, ledger, case)


def _load(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> ComposedVLM:
    tower, text = config["vision_tower"], config["text"]
    known = {k: v for k, v in tower.items() if not k.startswith("mm_") and k != "kind"}
    plan, vision_config = plan_tower(
        CLIPVisionConfig(**known),
        layer=tower.get("mm_vision_select_layer", -2),
        select=tower.get("mm_vision_select_feature", "patch"),
        where=str(directory),
    )
    composed = ComposedConfig.compose(
        vision_config=vision_config,
        text_config=LlamaConfig(**text),
        tower=plan,
        connector_kind=config.get("mm_projector_type", "linear"),
        pixel_shuffle=1,
        image_token_id=int(text["vocab_size"]),
        image_embed_scale=1.0,
    )
    tensors = dict(read_tensors(directory))
    return fill_model(
        composed, tensors, to_composed, from_composed, dtype=dtype, where=str(directory)
    )


def _pictures(config: dict[str, Any], ledger: Ledger) -> None:
    names = sorted(name for name in ledger.arrays if name.startswith("picture_"))
    for array, square in (("images_pad", True), ("images_square", False)):
        if array not in ledger:
            continue
        theirs = ledger.arrays[array]
        ours = torch.zeros_like(theirs)  # slots without a picture are those of text
        for slot, name in enumerate(names):
            ours[slot] = prepared(
                ledger.take(name), square=square, side_px=theirs.shape[-1], settings=config
            )
        if names:
            ledger.compare(array, ours)


def _case(model: ComposedVLM, config: dict[str, Any], ledger: Ledger, case: str) -> None:
    settings = config.get("cases", {}).get(case, {})
    ids, labels = ledger.take(f"{case}.input_ids"), ledger.take(f"{case}.labels")
    name = f"{case}.attention_mask"
    mask = ledger.take(name) if name in ledger else torch.ones_like(ids)
    images = ledger.take("images_pad")
    rows = spliced(
        ids,
        labels,
        mask,
        num_image_tokens=model.grid.num_tokens(*images.shape[-2:]),
        image_token_id=model.image_token_id,
        left=settings.get("padding_side") == "left",
        max_tokens=settings.get("tokenizer_model_max_length"),
    )
    ledger.compare(f"{case}.spliced_labels", rows.labels)
    ledger.compare(f"{case}.spliced_attention_mask", rows.mask)
    ledger.compare(f"{case}.spliced_position_ids", rows.positions)
    name = f"{case}.image_slots"
    slots = _slots(ids, mask, ledger.take(name).tolist() if name in ledger else [])
    pixels = images[slots] if slots else None
    cut = int((rows.ids == model.image_token_id).sum()) != len(slots) * int(
        model.grid.num_tokens(*images.shape[-2:])
    )
    if cut:
        for suffix in ("inputs_embeds", "loss", "logits", "hidden_last"):
            ledger.leave(f"{case}.{suffix}", "an image is cut in two, which is refused here")
        return
    _forward(model, rows, pixels, ledger, case)


def _slots(ids_BT: Tensor, mask_BT: Tensor, slots: list[int]) -> list[int]:
    """Returns the images that stand in the text: a row without one still owns a slot there."""
    taken: list[int] = []
    rest = iter(slots)
    for ids, mask in zip(ids_BT, mask_BT, strict=True):
        count = int((ids[mask.bool()] == PLACEHOLDER).sum())
        own = list(itertools.islice(rest, max(count, 1)))
        taken += own if count else []
    return taken


def _forward(
    model: ComposedVLM, rows: Spliced, pixels: Tensor | None, ledger: Ledger, case: str
) -> None:
    """Runs the rows packed, as training does, and puts what comes out where padding was."""
    model.zero_grad()
    model.train()
    real = rows.mask.bool()
    lengths = rows.mask.sum(1)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    packed_ids = rows.ids[real][None]
    ledger.compare(
        f"{case}.inputs_embeds", _unpacked(model.embed(packed_ids, pixels)[0], real), kept=real
    )
    hidden = model.hidden_states(
        input_ids_BT=packed_ids,
        position_ids_BT=rows.positions[real][None],
        cu_seqlens=starts.int(),
        max_seqlen=int(lengths.max()),
        pixel_values_NCYX=pixels,
    )[0]
    ledger.compare(f"{case}.hidden_last", _unpacked(hidden, real), kept=real)
    ledger.compare(f"{case}.logits", _unpacked(model.logits(hidden), real), kept=real)
    if f"{case}.loss" not in ledger:
        return
    labels = rows.labels[real].clone()
    labels[starts[:-1]] = IGNORE_INDEX  # no row's first token follows from another row
    index = (labels != IGNORE_INDEX).nonzero()[:, 0]
    loss = torch.nn.functional.cross_entropy(model.logits(hidden[index - 1]).float(), labels[index])
    ledger.compare(f"{case}.loss", loss)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    prefix = f"{case}.grad."
    for name in ledger.arrays:
        gradient = gradients.get(to_composed(name.removeprefix(prefix)))
        if name.startswith(prefix) and gradient is not None:
            ledger.compare(name, gradient)
    model.eval()


def _unpacked(packed_TD: Tensor, real_BT: Tensor) -> Tensor:
    out = packed_TD.new_zeros(*real_BT.shape, *packed_TD.shape[1:])
    out[real_BT] = packed_TD
    return out
