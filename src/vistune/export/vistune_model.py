"""Writes vistune's own model directory: whole, and independent of the parts it came from."""

from __future__ import annotations

from pathlib import Path

from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.export.files import MAX_SHARD, write_tokenizer
from vistune.models.compose import ComposedVLM
from vistune.models.tune.lora import adapter_layers
from vistune.models.weights import quiet_transformers
from vistune.models.whole import FamilyModel


def write_vistune(
    model: ComposedVLM | FamilyModel, encoder: Encoder, manifest: Manifest, folder: Path
) -> None:
    """Writes a model that `load_assembled` reads.

    Args:
        model: Adapters merged.
        encoder: Its encoder.
        manifest: Its description, of kind `model`.
        folder: An empty directory.

    Raises:
        ModelError: The model still carries adapters.
    """
    assert manifest.kind == "model"
    if adapter_layers(model):
        raise ModelError("the model still carries adapters", fix="merge them first")
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    write_tokenizer(folder, encoder)
    write_manifest(folder, manifest)
