"""Writes a model of a family in its own public layout, or in SwissArmyTransformer's.

Weights and config are the public code's; tokenizer and `vistune.json` lie beside them. What a
public directory holds besides (keys that only its own code reads, that code, defaults of
generation) is taken along, unread.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from vistune.checkpoint.layouts.cogvlm2 import write_cogvlm2
from vistune.checkpoint.layouts.family_model import own_layout
from vistune.checkpoint.layouts.mgm import write_mgm
from vistune.checkpoint.layouts.visualglm_hf import write_visualglm_hf
from vistune.checkpoint.layouts.visualglm_sat import write_visualglm_sat
from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.export.files import name_class, write_json
from vistune.models.chatglm.tokenizer import VOCABULARY_NAME
from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration
from vistune.models.facts import read_json
from vistune.models.families.files import CONFIG_NAME
from vistune.models.families.visualglm import SAT_CONFIG_NAME, is_sat, read_sat_tensors
from vistune.models.language.pieces import PIECES_NAME
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.tune.lora import adapter_layers
from vistune.models.visualglm import VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import POSITIONS
from vistune.models.whole import WholeModel

_GENERATION_NAME = "generation_config.json"
# The weights written are in one plain format, which `torch_dtype` names.
_NOT_OURS = ("dtype", "quantization_config")


def write_family(
    model: WholeModel,
    encoder: Encoder,
    manifest: Manifest,
    folder: Path,
    *,
    to: Literal["native", "sat"],
    dtype: torch.dtype,
    origin: Path | None,
) -> None:
    """Writes a model in the layout it was published in.

    Args:
        model: Adapters merged.
        encoder: Its encoder.
        manifest: Its description, of kind `model`.
        folder: An empty directory.
        to: `native`: the public layout (transformers' for VisualGLM); `sat`: VisualGLM in
            SwissArmyTransformer's.
        dtype: Format of the weights.
        origin: The directory the model came from, whose other files are taken along.

    Raises:
        ModelError: The model has no such layout, or still carries adapters.
    """
    if adapter_layers(model):
        raise ModelError("the model still carries adapters", fix="merge them first")
    if to == "sat" and not isinstance(model, VisualGLMForConditionalGeneration):
        raise ModelError(
            "only VisualGLM has a SwissArmyTransformer layout",
            got=type(model).__name__,
            fix="export with --to native or --to vistune",
        )
    if isinstance(model, CogVLM2ForConditionalGeneration):
        write_cogvlm2(model, folder, dtype=dtype)
    elif isinstance(model, MGMForConditionalGeneration):
        write_mgm(model, folder, dtype=dtype)
    elif isinstance(model, VisualGLMForConditionalGeneration):
        if to == "sat":
            found = read_sat_tensors(origin) if origin is not None and is_sat(origin) else {}
            write_visualglm_sat(model, folder, dtype=dtype, positions=found.get(POSITIONS))
        else:
            write_visualglm_hf(model, folder, dtype=dtype)
    else:
        raise ModelError(
            "a model put together from parts has no public layout of its own",
            got=type(model).__name__,
            fix="export with --to hf, --to llava, --to xtuner or --to vistune",
        )
    encoder.tokenizer.save_pretrained(folder)
    name_class(folder)
    if origin is not None:
        _take_along(origin, folder)
    write_manifest(folder, manifest)


def _take_along(origin: Path, folder: Path) -> None:
    """Copies what only the public code reads: pieces of the tokenizer, its files, its settings."""
    for name in (VOCABULARY_NAME, PIECES_NAME, _GENERATION_NAME):
        if (origin / name).is_file():
            shutil.copy(origin / name, folder / name)
    for name in (CONFIG_NAME, SAT_CONFIG_NAME):
        if not ((origin / name).is_file() and (folder / name).is_file()):
            continue
        theirs, ours = read_json(origin / name), read_json(folder / name)
        if own_layout(theirs) is not None:
            return  # vistune's own directory of the model speaks of other names
        for code in origin.glob("*.py"):
            shutil.copy(code, folder / code.name)
        write_json(folder / name, _completed(ours, theirs))


def _completed(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns settings with those that are not known here, in parts of them too."""
    more = {key: value for key, value in theirs.items() if key not in (*ours, *_NOT_OURS)}
    both = {
        key: _completed(value, theirs[key])
        for key, value in ours.items()
        if isinstance(value, dict) and isinstance(theirs.get(key), dict)
    }
    return {**more, **ours, **both}
