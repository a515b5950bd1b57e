"""Folds LoRA adapters of a PEFT directory into a part's weights, every tensor accounted for.

Plain LoRA is read, as PEFT, XTuner (`llm_adapter/`, `visual_encoder_adapter/`) and others write it,
one rank for all layers or ranks by name; what would need more (DoRA, modules trained besides) is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    pairs = _read(folder, key=key)
    entries = {} if public is None else {entry.public: entry for entry in public.entries}
    changes: dict[str, Tensor] = {}
    for module, (first_RI, second_OR, scale) in pairs.items():
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


def _read(folder: Path, *, key: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Returns both factors of every adapted module, and the factor on their product."""
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
    ranks = _Sizes(config.get("r"), config.get("rank_pattern") or {})
    alphas = _Sizes(config.get("lora_alpha"), config.get("alpha_pattern") or {})
    if more or not ranks.are(int) or not alphas.are((int, float)):
        raise ModelError(
            "only plain LoRA adapters can be folded in",
            where=str(config_file),
            got=", ".join(more) or f"r={ranks}, lora_alpha={alphas}",
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
    power = 0.5 if config.get("use_rslora") else 1.0
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for module, pair in pairs.items():
        rank = ranks.of(module)
        if pair["A"].shape[0] != rank or pair["B"].shape[-1] != rank:
            raise WeightsError(
                "an adapter has another rank than its config says",
                where=f"{folder}: {module}",
                got=f"lora_A {tuple(pair['A'].shape)}, lora_B {tuple(pair['B'].shape)}",
                expected=f"rank {rank}",
            )
        found[module] = pair["A"], pair["B"], float(alphas.of(module) / rank**power)
    return found


@dataclass(frozen=True)
class _Sizes:
    """A rank or an alpha, and those of modules whose names a pattern matches, as PEFT has them."""

    usual: Any
    patterns: Mapping[str, Any]

    def are(self, kind: Any) -> bool:
        """Whether all of them are of a type."""
        return all(isinstance(value, kind) for value in (self.usual, *self.patterns.values()))

    def of(self, module: str) -> Any:
        """Returns a module's: by the first pattern that matches the end of its name."""
        matching = (
            value
            for pattern, value in self.patterns.items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        )
        return next(matching, self.usual)

    def __str__(self) -> str:
        return f"{self.usual} {dict(self.patterns)}" if self.patterns else str(self.usual)


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    for name in _FILES:
        if (folder / name).is_file():
            return read_tensors_of(folder / name)
    raise WeightsError(
        "the adapter has no weights", where=str(folder), expected=" or ".join(_FILES)
    )
