"""Exports a run, a checkpoint of it, or a model directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import safe_open

from vistune._version import __version__
from vistune.assembly import (
    Assembled,
    Blueprint,
    Origin,
    build_parts,
    draw_directory,
    lay_over,
    load_assembled,
)
from vistune.checkpoint.files import INHERITED_NAME
from vistune.checkpoint.layouts import llava_hf, vistune_model
from vistune.checkpoint.load import resolve_checkpoint
from vistune.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.errors import CheckpointError, ModelError
from vistune.export.adapter import write_adapter
from vistune.export.family import write_family
from vistune.export.files import new_directory
from vistune.export.hf import compare_hf, misfits, write_hf
from vistune.export.llava import misfits_llava, write_llava
from vistune.export.native import (
    check_native_form,
    compare_native,
    is_native_directory,
    write_native,
)
from vistune.export.native_adapter import write_native_adapter
from vistune.export.tower import whole_tower
from vistune.export.vistune_model import write_vistune
from vistune.export.xtuner import write_xtuner
from vistune.models.compose import ComposedVLM
from vistune.models.facts import ModelFacts, read_json
from vistune.models.families.files import read_tensors
from vistune.models.families.visualglm import is_sat, read_sat_tensors
from vistune.models.native import NativeVLM
from vistune.recipe import ModelConfig

Target: TypeAlias = Literal["hf", "adapter", "vistune", "native", "sat", "llava", "xtuner"]

_OF_COMPOSED = ("hf", "llava", "adapter", "xtuner")
# Relative to the largest logit: rounding of another order of operations.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def export_model(
    path: Path,
    *,
    to: Target,
    output: Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    origin: Origin | None = None,
) -> Path:
    """Writes a trained model in another form.

    Args:
        path: Run directory (its newest checkpoint), checkpoint, or model directory.
        to: `hf`: transformers' LLaVA, or the class of transformers the model is of; `adapter`: PEFT
            adapters and connector; `vistune`: one self-describing directory; `native`: a family's
            own public layout; `sat`: VisualGLM in
            SwissArmyTransformer's; `llava`: the original LLaVA's layout; `xtuner`: projector and
            adapters (or language model) as XTuner keeps them.
        output: Directory to write.
        overwrite: Replace what is there.
        dtype: Format of the weights; that of the language model's config when left out.
        verify: Load an `hf` export with transformers and compare its logits.
        origin: What a directory of another project does not say itself.

    Returns:
        The directory written.

    Raises:
        CheckpointError: `path` holds nothing to export, `output` is taken, or the written model
            answers differently.
        ModelError: The model has no such form.
    """
    folder = resolve_checkpoint(path)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    origin = origin or Origin()
    encoder = origin.bases.vision_tower
    if to == "llava" and encoder is not None and _holds_its_tower(folder, manifest):
        # It stands on no other; the layout alone has to name one.
        origin = replace(origin, bases=origin.bases.model_copy(update={"vision_tower": None}))
    blueprint = draw_directory(folder, origin)
    for note in blueprint.notes:
        print(f"note: {note}", file=sys.stderr)
    facts = blueprint.facts
    stands_on = _origin(blueprint.sources)
    dtype = dtype or _stored_dtype(facts, stands_on)
    is_native = stands_on is not None and is_native_directory(stands_on)
    if is_native:
        check_native_form(to)
    elif to in _OF_COMPOSED:
        _check_composed(facts, to)
    with new_directory(output, overwrite=overwrite) as target:
        if to in ("adapter", "xtuner"):
            _write_unmerged(manifest, blueprint, target, to=to, dtype=dtype, where=folder)
            return output
        found = load_assembled(folder, dtype=dtype, origin=origin)
        whole = _manifest_of_whole(manifest, found.encoder, folder)
        if to in ("hf", "llava") and isinstance(found.model, ComposedVLM):
            tower_path = _tower_path(blueprint.parts) or encoder
            _write_llava_kind(
                found, whole, blueprint, target, to=to, tower_path=tower_path, verify=verify
            )
        else:
            _write_merged(found, whole, blueprint, target, to=to, dtype=dtype, verify=verify)
    return output


def _holds_its_tower(folder: Path, manifest: Manifest | None) -> bool:
    """Whether a model comes from a directory that holds its tower and names no encoder."""
    whole: Path | None = folder
    if manifest is not None and manifest.parts is not None:
        named = manifest.parts.from_checkpoint
        whole = None if named is None else Path(named)
    if whole is None or not (whole / "config.json").is_file():
        return False
    values = read_json(whole / "config.json")
    return llava_hf.matches(values) or vistune_model.matches(values)


def _write_merged(
    found: Assembled,
    whole: Manifest,
    blueprint: Blueprint,
    target: Path,
    *,
    to: Target,
    dtype: torch.dtype,
    verify: bool,
) -> None:
    """Writes a model whose adapters are merged."""
    model, encoder, stands_on = found.model, found.encoder, _origin(blueprint.sources)
    if isinstance(model, NativeVLM):
        write_native(model, encoder, target, origin=stands_on)
        if to == "vistune":
            write_manifest(target, whole)
        elif verify:
            _check_same(compare_native(model, encoder, target), model, where=found.origin)
    elif to == "vistune":
        write_vistune(model, encoder, whole, target)
    else:
        assert to in ("native", "sat")
        write_family(model, encoder, whole, target, to=to, dtype=dtype, origin=stands_on)


def _write_llava_kind(
    found: Assembled,
    whole: Manifest,
    blueprint: Blueprint,
    target: Path,
    *,
    to: Target,
    tower_path: str | None,
    verify: bool,
) -> None:
    """Writes transformers' LLaVA or the original one, which only composed models can be."""
    model = found.model
    assert isinstance(model, ComposedVLM)
    wrong = misfits_llava(model) if to == "llava" else misfits(model)
    # What does not fit is said before the encoder is read once more.
    tower = None if wrong else whole_tower(model, blueprint.sources)
    if to == "llava":
        write_llava(
            model,
            found.encoder,
            whole,
            target,
            tower_path=tower_path,
            tower=tower,
            source=_tokenizer_path(blueprint.sources),
        )
        return
    write_hf(model, found.encoder, target, tower=tower)
    if verify:
        _check_same(compare_hf(model, found.encoder, target), model, where=found.origin)


def _check_same(error: float, model: torch.nn.Module, *, where: Path) -> None:
    """Refuses an export that transformers answers differently from.

    Raises:
        CheckpointError: The logits differ by more than rounding.
    """
    if not error <= _TOLERANCE.get(next(model.parameters()).dtype, 5e-2):
        raise CheckpointError(
            "transformers computes other logits from the export than vistune",
            where=str(where),
            got=f"a relative difference of {error:.1e}",
            fix="export with --to vistune",
        )


def _stored_dtype(facts: ModelFacts, origin: Path | None) -> torch.dtype:
    """Returns the format a model's weights are stored in where it comes from.

    The configs of parts say it. Where those of whole models do not, the weights are asked.
    """
    stored = getattr(facts.text_config, "dtype", None)
    if isinstance(stored, torch.dtype):
        return stored
    if origin is None:
        return torch.float32
    sat = is_sat(origin)
    tensors = read_sat_tensors(origin).values() if sat else (t for _, t in read_tensors(origin))
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _check_composed(facts: ModelFacts, to: Target) -> None:
    """Refuses a family's model for a form that only models put together from parts have.

    Raises:
        ModelError: It is a family's model.
    """
    if facts.tower is None:
        raise ModelError(
            "a model of a family cannot be written in this form",
            where=f"--to {to}",
            got=type(facts.text_config).__name__,
            fix="export with --to native or --to vistune",
        )


def _origin(parts: ModelConfig) -> Path | None:
    """Returns the directory whose weights and tokenizer a model of a family came from."""
    if parts.vision_tower_aux is not None and parts.language_model is not None:
        return Path(parts.language_model.path).expanduser()
    return None if parts.from_checkpoint is None else Path(parts.from_checkpoint)


def _tokenizer_path(parts: ModelConfig) -> Path | None:
    """Returns the local directory that a composed model's tokenizer was read from."""
    named = parts.from_checkpoint if parts.language_model is None else parts.language_model.path
    folder = None if named is None else Path(named).expanduser()
    return folder if folder is not None and folder.is_dir() else None


def _tower_path(parts: ModelConfig) -> str | None:
    """Returns where the encoder of a model's tower is, or that of a LLaVA it stands on."""
    if parts.vision_tower is not None:
        return parts.vision_tower.path
    if parts.bases.vision_tower is not None or parts.from_checkpoint is None:
        return parts.bases.vision_tower
    named = read_json(Path(parts.from_checkpoint) / "config.json").get("mm_vision_tower")
    return None if named is None else str(named)


def _write_unmerged(
    manifest: Manifest | None,
    blueprint: Blueprint,
    target: Path,
    *,
    to: Target,
    dtype: torch.dtype,
    where: Path,
) -> None:
    parts = None if manifest is None else manifest.parts
    if manifest is None or parts is None:
        raise CheckpointError(
            "only a run or a checkpoint of it has adapters to export",
            where=str(where),
            fix="export with --to hf or --to vistune",
        )
    if to == "adapter":
        _check_no_folded(parts, where)
    manifest = manifest.model_copy(update={"parts": blueprint.parts})  # where they are now
    facts, sources = blueprint.facts, blueprint.sources
    encoder = Encoder.from_state(manifest.encoder, facts.tokenizer)
    model = build_parts(sources, facts, seed=manifest.seed, dtype=dtype)
    before = _trained_before(where, model.module_map.connector)
    lay_over(model, where, parts=blueprint.sources)
    if isinstance(model, NativeVLM):
        write_native_adapter(
            model, encoder, manifest, target, origin=_origin(sources), with_connector=bool(before)
        )
        return
    assert isinstance(model, ComposedVLM)
    write = write_xtuner if to == "xtuner" else write_adapter
    write(model, encoder, manifest, target)


def _trained_before(checkpoint: Path, connector: Sequence[str]) -> list[str]:
    """Returns the weights of the connector that an earlier run trained, and refuses any other.

    Args:
        checkpoint: The checkpoint.
        connector: Module paths of the model's connector.

    Raises:
        CheckpointError: An earlier run trained what an adapter cannot hold.
    """
    file = checkpoint / INHERITED_NAME
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
    inside = tuple(f"{prefix}." for prefix in connector)
    changed = [name for name in names if not name.startswith(inside)]
    if changed:
        raise CheckpointError(
            "these adapters stand on weights that an earlier run trained, so their base is in no"
            " directory that others could load",
            where=str(checkpoint),
            got=f"{len(changed)} such weights",
            fix="export with --to hf or --to vistune",
        )
    return names


def _check_no_folded(parts: ModelConfig, checkpoint: Path) -> None:
    """Refuses adapters beside weights that already hold others, which no base directory has."""
    named = (parts.language_model, parts.vision_tower)
    folded = [part.adapter for part in named if part is not None and part.adapter is not None]
    if folded:
        raise CheckpointError(
            "these adapters stand on weights with other adapters folded in, which are in no"
            " directory that others could load",
            where=str(checkpoint),
            got=", ".join(folded),
            fix="export with --to hf or --to vistune",
        )


def _manifest_of_whole(manifest: Manifest | None, encoder: Encoder, folder: Path) -> Manifest:
    state = encoder.to_state()
    if manifest is None:
        return Manifest(vistune_version=__version__, kind="model", encoder=state)
    return manifest.model_copy(
        update={
            "vistune_version": __version__,
            "kind": "model",
            "parts": None,
            "part_fingerprints": {},
            "tune": {},
            "encoder": state,
            "merged_from": (*manifest.merged_from, str(folder)),
        }
    )
