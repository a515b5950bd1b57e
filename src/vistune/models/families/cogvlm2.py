"""CogVLM2 as a family: how a public directory is recognised and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistune.errors import WeightsError
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration
from vistune.models.cogvlm2.config import RotaryPrecision
from vistune.models.cogvlm2.rotary import inverse_frequencies
from vistune.models.families.contract import FAMILIES
from vistune.models.families.files import built_on_meta, fill, read_config, read_tensors

_FREQUENCIES_SUFFIX = ".self_attn.rotary_emb.inv_freq"
# The stored frequencies may be bfloat16 (8 bits of mantissa); another base is off by far more.
_FREQUENCIES_RTOL = 2.0**-7


def load_cogvlm2(
    directory: Path, dtype: torch.dtype, *, rotary_precision: RotaryPrecision | None = None
) -> CogVLM2ForConditionalGeneration:
    """Loads a directory in the public layout, every tensor accounted for.

    Args:
        directory: `config.json` and weight files.
        dtype: Number format of the weights.
        rotary_precision: See `CogVLM2Config`; what the config says where None.

    Raises:
        ModelError: The config does not describe a CogVLM2 model.
        WeightsError: A tensor is missing, left over, of another shape, or the stored rotary
            frequencies are not those of the config.
    """
    settings = read_config(directory)
    if rotary_precision is not None:
        settings["rotary_precision"] = rotary_precision
    config = CogVLM2Config(**settings)
    model = built_on_meta(lambda: CogVLM2ForConditionalGeneration(config))
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(directory)}
    fill(model, tensors, where=str(directory))
    _check_frequencies(tensors, config, where=str(directory))
    model.eval()
    return model


def _check_frequencies(tensors: Mapping[str, Tensor], config: CogVLM2Config, *, where: str) -> None:
    """Proves that all layers store one set of frequencies, and that it is the config's."""
    expected = inverse_frequencies(config)
    first: Tensor | None = None
    for name in sorted(name for name in tensors if name.endswith(_FREQUENCIES_SUFFIX)):
        stored = tensors[name]
        first = stored if first is None else first
        close = torch.allclose(stored.float(), expected, rtol=_FREQUENCIES_RTOL, atol=0.0)
        if not close or not torch.equal(stored, first):
            raise WeightsError(
                "the stored rotary frequencies are not those of the config",
                where=f"{where}: {name}",
                got=f"{stored.flatten()[:3].tolist()} ...",
                expected=f"{expected[:3].tolist()} ... (base {config.rope_theta:g})",
                fix="set rope_theta in config.json to the base these weights were trained with",
            )


class CogVLM2Family:
    """The chat and base models of CogVLM2-Llama3, which hold an image expert in every layer."""

    name = "cogvlm2"

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether a model directory holds this family; see `Family.matches`."""
        vision = config.get("vision_config")
        return (
            isinstance(vision, Mapping)
            and "num_positions" in vision
            and "num_multi_query_heads" in config
            # By groups of names: a single one that is missing shall be named, not hide the family.
            and any(key.startswith("model.vision.linear_proj.") for key in keys)
            and any(".vision_expert_" in key for key in keys)
        )

    def settings(self, directory: Path) -> CogVLM2Config:
        """Returns the config of a public directory."""
        return CogVLM2Config(**read_config(directory))

    def load(self, directory: Path, dtype: torch.dtype) -> CogVLM2ForConditionalGeneration:
        """Loads a public directory; see `load_cogvlm2`."""
        return load_cogvlm2(directory, dtype)


FAMILIES.register(CogVLM2Family.name)(CogVLM2Family())
