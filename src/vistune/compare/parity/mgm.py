"""MGM on Gemma: pictures, both towers, mining, splicing, logits, loss, gradients.

One file is one run; a config with several (`runs`) holds what differs, by the file's name
(`io_<run>.npz`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.compare.parity.ledger import Ledger
from vistune.compare.parity.pictures import PLACEHOLDER, prepared, spliced
from vistune.models.families.files import CONFIG_NAME, read_tensors
from vistune.models.families.filling import filled
from vistune.models.families.mgm import MGMFamily
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map

NAME = "mgm"


def matches(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether a directory holds an MGM on Gemma."""
    return any(MGMFamily("mgm", cuts=cuts).matches(config, keys) for cuts in (False, True))


def compare(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    """Compares one file; see `Case`."""
    run = ledger.file.removeprefix("io_").removesuffix(".npz")
    settings = {**config, **config.get("runs", {}).get(run, {})}
    model = _load(directory, settings, erf=False, dtype=ledger.dtype)
    _pictures(settings, ledger)
    _towers_and_mining(model, ledger)
    rows = _rows(model, settings, ledger)
    _language(model, rows, ledger)
    if ledger.has("loss_act_gelu_erf") or ledger.has("logits_row0_act_gelu_erf"):
        _older_activation(_load(directory, settings, erf=True, dtype=ledger.dtype), rows, ledger)
    ledger.leave("position_ids_returned_is_none", "says nothing of the model")


def _load(
    directory: Path, settings: dict[str, Any], *, erf: bool, dtype: torch.dtype
) -> MGMForConditionalGeneration:
    tensors = dict(read_tensors(directory))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = MGMConfig.from_public(settings, shapes, where=str(directory / CONFIG_NAME))
    config.gemma_erf_gelu = erf
    own = mgm_map(config).from_public(tensors, where=str(directory))
    model = filled(MGMForConditionalGeneration, config, own, dtype, where=str(directory))
    assert isinstance(model, MGMForConditionalGeneration)
    return model


def _pictures(settings: dict[str, Any], ledger: Ledger) -> None:
    """High-resolution inputs from the source pictures, where the file holds these."""
    images = ledger.take("images_aux")
    modes = settings.get("image_aspect_ratio_per_row", [])
    numbers = [n for n in range(len(modes)) if f"picture_{n}_uint8" in ledger]
    if not numbers or "image_mean" not in settings:
        return
    for number in numbers:
        ours = prepared(
            ledger.take(f"picture_{number}_uint8"),
            square=modes[number] == "pad",
            side_px=int(images.shape[-1]),
            settings=settings,
        )
        whole = images.clone()
        whole[number] = ours
        ledger.compare("images_aux", whole)


def _towers_and_mining(model: MGMForConditionalGeneration, ledger: Ledger) -> None:
    pixels, num_crops = ledger.take("images_aux"), model.config.num_crops
    crops, whole = model.low_resolution(pixels)
    pictures = crops if whole is None else torch.cat((crops, whole[:, None]), dim=1)
    if "images" in ledger:
        ledger.compare("images", pictures.reshape(ledger.arrays["images"].shape))
    for stage, maps in enumerate(model.vision_tower_aux(pixels)):
        ledger.compare(f"aux_stage_{stage}_row0", maps[0])
    joined = model.high_features(pixels)
    ledger.compare("aux_map_row0", joined[0])
    ledger.compare("aux_map_mean_per_channel", joined.mean((2, 3)))
    ledger.compare("aux_map_mean_per_position", joined.mean(1))
    low, maps, whole_maps = model.paired_features(pixels)
    features = low[:, -num_crops:].flatten(0, 1)
    mined = model.connector.mining(features, maps)
    ledger.compare("mined", mined)
    found = mined.reshape(low.shape[0], -1, *mined.shape[1:])
    if whole_maps is not None:
        ledger.compare("aux_global_map_row0_strided", whole_maps[0, :, ::4, ::4])
        mined_global = model.connector.mining(low[:, 0], whole_maps)
        ledger.compare("mined_global", mined_global)
        # The reference lists all crops of all rows, then all whole pictures.
        features = torch.cat((features, low[:, 0]))
        found = torch.cat((mined_global[:, None], found), dim=1)
    ledger.compare("lr_features", features)
    ledger.compare("projector_input", (low + found).flatten(1, 2))
    ledger.compare("projected", model.image_embeddings(pixels))


@dataclass(frozen=True)
class _Rows:
    """The rows with image tokens in their places, padded on the right."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    pixels: Tensor


def _rows(model: MGMForConditionalGeneration, settings: dict[str, Any], ledger: Ledger) -> _Rows:
    pixels = ledger.take("images_aux")
    rows = spliced(
        ledger.take("input_ids"),
        ledger.take("labels"),
        ledger.take("attention_mask"),
        num_image_tokens=model.grid.num_tokens(*pixels.shape[-2:]),
        image_token_id=model.image_token_id,
    )
    ledger.compare("spliced_labels", rows.labels)
    ledger.compare("spliced_attention_mask", rows.mask)
    counts = (ledger.take("input_ids") == PLACEHOLDER).sum(1).tolist()
    with_image = [row for row, count in enumerate(counts) for _ in range(count)]
    return _Rows(rows.ids, rows.mask, rows.labels, pixels[with_image])


def _language(model: MGMForConditionalGeneration, rows: _Rows, ledger: Ledger) -> None:
    real = rows.mask.bool()
    embeds = model.embed(rows.ids, rows.pixels)
    ledger.compare("scaled_embeds", embeds, kept=real)
    ledger.compare("inputs_embeds", embeds / model.config.text_config.hidden_size**0.5, kept=real)
    out = model(
        rows.ids, pixel_values=rows.pixels, attention_mask=rows.mask, output_hidden_states=True
    )
    assert out.hidden_states is not None
    ledger.compare("hidden_last", out.hidden_states[-1], kept=real)
    ledger.compare("logits", out.logits, kept=real)
    loss = _loss(out.logits, rows)
    ledger.compare("loss", loss)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    own = {entry.public: entry.own[0] for entry in mgm_map(model.config).entries}
    for name in ledger.arrays:
        gradient = gradients.get(own.get(name.removeprefix("grad."), ""))
        if name.startswith("grad.") and gradient is not None:
            ledger.compare(name, gradient)


@torch.no_grad()
def _older_activation(model: MGMForConditionalGeneration, rows: _Rows, ledger: Ledger) -> None:
    out = model(rows.ids, pixel_values=rows.pixels, attention_mask=rows.mask)
    ledger.compare("logits_row0_act_gelu_erf", out.logits[0], kept=rows.mask[0].bool())
    ledger.compare("loss_act_gelu_erf", _loss(out.logits, rows))


def _loss(logits: Tensor, rows: _Rows) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten())
