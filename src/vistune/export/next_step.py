"""What a person would run after an export: one line, with the paths filled in."""

from __future__ import annotations

import shlex
from pathlib import Path

from vistune.checkpoint.load import resolve_checkpoint
from vistune.checkpoint.manifest import Manifest, read_manifest
from vistune.data.template import TEMPLATES
from vistune.export.run import Target
from vistune.models.facts import read_json

_PARTS = {"language_model": "AutoModelForCausalLM", "vision_tower": "AutoModel"}


def next_step(path: Path, *, to: Target, output: Path) -> str:
    """Returns the command that uses what was exported, or the line of Python for adapters.

    Args:
        path: What was exported, as `export_model` was given it.
        to: The form.
        output: The directory written.
    """
    if to in ("adapter", "xtuner"):
        return _of_pieces(read_manifest(resolve_checkpoint(path)), path, to=to, output=output)
    return shlex.join(["vistune", "chat", str(output), "--image", "photo.jpg"])


def _of_pieces(manifest: Manifest, path: Path, *, to: Target, output: Path) -> str:
    whole = manifest.parts is not None and manifest.parts.from_checkpoint is not None
    if to == "adapter":
        if whole and not (output / "adapter_config.json").is_file():
            # Its base has the part inside, under other names than the part alone.
            merged = f"{output}-merged"
            return shlex.join(["vistune", "export", str(path), "--to", "hf", "-o", merged])
        return _with_peft(output)
    # XTuner's directories have no place for the template.
    name = manifest.encoder["template"].get("name")
    told = ["--template", name] if name in TEMPLATES else []
    return shlex.join(["vistune", "chat", str(output), *told, "--image", "photo.jpg"])


def _with_peft(output: Path) -> str:
    """Returns how an adapter is put on its base: of a whole model, or of the part that has one."""
    folder, loader = output, "AutoModelForImageTextToText"
    if not (output / "adapter_config.json").is_file():
        part = next(part for part in _PARTS if (output / part).is_dir())
        folder, loader = output / part, _PARTS[part]
    base = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    return f"PeftModel.from_pretrained({loader}.from_pretrained({base!r}), {str(folder)!r})"
