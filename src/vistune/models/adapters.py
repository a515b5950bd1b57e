"""Folds LoRA adapters of a PEFT directory into a part's weights, every tensor accounted for.

Plain LoRA is read, as PEFT, XTuner (`llm_adapter/`, `visual_encoder_adapter/`) and others write it;
what would need more (DoRA, ranks by layer, modules trained besides) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune.errors import ModelError, WeightsError
from vistune.models.connector_weights import read_tensors_of
from vistune.models.facts import read_json
from vistune.models.keymap import KeyMap
from vistune.models.weights import check_keys

_PREFIX = "base_model.model."
_CONFIG_NAME = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}


def fold_adapter(
    part: nn.Module,
    folder: Path,
    *,
    key: str,
    own_name: Callable[[str], str] = lambda name: name,
    left_out: Callable[[str], bool] = lambda name: False,
    public: KeyMap | None = None,
) -> int:
    """Adds the product of every pair of adapters to the weight it stands beside.

    Args:
        part: The language model or the tower, changed in place; sums are made in fp32.
        folder: The PEFT directory.
        key: Its key in the recipe, for messages.
        own_name: The adapter's name of a weight -> the part's name.
        left_out: Whether a weight of the encoder is one that the part leaves out.
        public: Names of a public layout that the adapter speaks of and the part does not have.

    Returns:
        The number of weights changed.

    Raises:
        ModelError: The directory is missing, or asks for more than plain LoRA.
        WeightsError: A tensor has no place, lacks its partner or is of another shape.
    """
    scale, pairs = _read(folder, key=key)
    entries = {} if public is None else {entry.public: entry for entry in public.entries}
    changes: dict[str, Tensor] = {}
    for module, (first_RI, second_OR) in pairs.items():
        name = own_name(f"{module}.weight")
        if left_out(name):
            continue
        change_OI = (second_OR.float() @ first_RI.float()) * scale
        if name in entries:
            entry = entries[name]
            changes.update(zip(entry.own, entry.form.split(change_OI), strict=True))
        else:
            changes[name] = change_OI
    own = dict(part.named_parameters())
    check_keys(
        unexpected=changes.keys() - own.keys(),
        mismatched=[
            (name, change.shape, own[name].shape)
            for name, change in changes.items()
            if name in own and change.shape != own[name].shape
        ],
        where=str(folder),
    )
    with torch.no_grad():
        for name, change in changes.items():
            own[name].copy_((own[name].float() + change).to(own[name].dtype))
    return len(changes)


def _read(folder: Path, *, key: str) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    config_file = folder / _CONFIG_NAME
    if not config_file.is_file():
        raise ModelError(
            "this is no adapter's directory",
            where=str(folder),
            expected=_CONFIG_NAME,
            fix=f"set {key}",
        )
    config = read_json(config_file)
    more = [f"{name}={config[name]}" for name in _PLAIN if config.get(name) not in _PLAIN[name]]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if more or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ModelError(
            "only plain LoRA adapters can be folded in",
            where=str(config_file),
            got=", ".join(more) or f"r={rank}, lora_alpha={alpha}",
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in _tensors(folder).items():
        module, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not name.startswith(_PREFIX) or half not in ("A", "B"):
            strange.append(name)
        pairs.setdefault(module, {})[half] = tensor
    single = [f"{m}.lora_{h}" for m, p in pairs.items() for h in {"A", "B"} - p.keys()]
    check_keys(unexpected=strange, missing=[] if strange else single, where=str(folder))
    if not pairs:
        raise WeightsError("the adapter holds no tensor", where=str(folder))
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return float(scale), {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    for name in _FILES:
        if (folder / name).is_file():
            return read_tensors_of(folder / name)
    raise WeightsError(
        "the adapter has no weights", where=str(folder), expected=" or ".join(_FILES)
    )
