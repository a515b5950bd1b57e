"""Writes a model of a family in its own public layout, or in SwissArmyTransformer's.

Weights and config are the public code's; tokenizer and `vistune.json` lie beside them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from vistune.checkpoint.layouts.cogvlm2 import write_cogvlm2
from vistune.checkpoint.layouts.mgm import write_mgm
from vistune.checkpoint.layouts.visualglm_hf import write_visualglm_hf
from vistune.checkpoint.layouts.visualglm_sat import write_visualglm_sat
from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.models.chatglm.tokenizer import VOCABULARY_NAME
from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration
from vistune.models.families.visualglm import is_sat, read_sat_tensors
from vistune.models.language.pieces import PIECES_NAME
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.tune.lora import adapter_layers
from vistune.models.visualglm import VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import POSITIONS
from vistune.models.whole import WholeModel


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
        origin: The directory the model came from, whose tokenizer files are taken along.

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
    # The public code reads the sentencepiece file.
    for name in (VOCABULARY_NAME, PIECES_NAME):
        if origin is not None and (origin / name).is_file():
            shutil.copy(origin / name, folder / name)
    write_manifest(folder, manifest)
