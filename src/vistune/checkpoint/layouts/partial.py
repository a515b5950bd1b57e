"""Directories and files that hold only what was trained, and name the models it stands on.

    <dir>/projector/ [llm_adapter/] [visual_encoder_adapter/] [config.json and weights]   XTuner
    iter_N.pth, as a file or as DeepSpeed's directory; mm_projector.bin           XTuner, LLaVA
    <dir>/config.json, mm_projector.bin                                    LLaVA and MGM, stage 1
    <dir>/config.json, adapter_config.json, non_lora_trainables.bin                 LLaVA, LoRA

Each is turned into the parts of an ordinary model. Where those are stands in the directory's own
config, or in the recipe (`model.bases`), which goes first. No Python file found there is ever run.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vistune.checkpoint.load import is_partial
from vistune.errors import ModelError
from vistune.models.connector_weights import read_beside, read_connector
from vistune.models.facts import read_json
from vistune.recipe import BasesConfig, ModelConfig

_XTUNER_CONFIG = "xtuner_config.py"
# What XTuner's configs call the bases.
_TOWER, _LANGUAGE = "visual_encoder_name_or_path", "llm_name_or_path"
TEMPLATES = {
    "internlm2_chat": "internlm2_chat",
    "llama3_chat": "llama3",
    "qwen_chat": "chatml",
}
"""XTuner's names of templates -> ours, of those that have the same words."""


@dataclass(frozen=True)
class Partial:
    """What a directory of trained pieces comes to.

    Args:
        parts: The parts of the model, pieces and bases together.
        template: The template it was trained with, where the tokenizer brings none; else `auto`.
        mode: How its images were made square, where it says so.
    """

    parts: ModelConfig
    template: str = "auto"
    mode: Literal["crop", "pad"] | None = None


def read_partial(path: Path, bases: BasesConfig) -> Partial | None:
    """Turns a directory or file of trained pieces into parts.

    Args:
        path: What a person named.
        bases: The models it stands on, where the recipe names them.

    Returns:
        None where `path` is something else.

    Raises:
        ModelError: Neither it nor the recipe says what it stands on, or it has a form that vistune
            does not compose.
        WeightsError: It holds other weights than its form has.
    """
    if not is_partial(path):
        return None
    if (path / "projector" / "config.json").is_file():
        return _xtuner_directory(path, bases)
    if (path / "config.json").is_file():
        return _llava_pieces(path, bases)
    return _connector_file(path, bases)


def _connector_file(path: Path, bases: BasesConfig) -> Partial:
    """A checkpoint of XTuner's training, or a file of weights: a projector alone, in any case."""
    num_linears = sum(tensor.dim() == 2 for tensor in read_connector(path).values())
    meta = read_beside(path).get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    named = _assignments(text, where=str(path)) if isinstance(text, str) else {}
    tower = _base("vision_tower", path, bases.vision_tower, named.get(_TOWER))
    parts = {
        "vision_tower": _xtuner_tower(tower),
        "language_model": {
            "path": _base("language_model", path, bases.language_model, named.get(_LANGUAGE))
        },
        "connector": {"kind": _kind(num_linears), "weights": str(path)},
    }
    return Partial(ModelConfig.model_validate(parts), _template(named))


def _xtuner_directory(path: Path, bases: BasesConfig) -> Partial:
    settings = read_json(path / "projector" / "config.json")
    if settings.get("hidden_act", "gelu") != "gelu" or not settings.get("bias", True):
        raise ModelError(
            "this projector has a form that vistune does not compose",
            where=str(path / "projector" / "config.json"),
            got=f"hidden_act {settings.get('hidden_act')}, bias {settings.get('bias')}",
            expected="hidden_act gelu, bias true",
        )
    file = path / _XTUNER_CONFIG
    named = _assignments(_text(file), where=str(file)) if file.is_file() else {}
    tower = _xtuner_part(
        "vision_tower",
        path,
        bases.vision_tower,
        whole=path / "visual_encoder",
        adapter=path / "visual_encoder_adapter",
        named=named.get(_TOWER),
    )
    language = _xtuner_part(
        "language_model",
        path,
        bases.language_model,
        whole=path,
        adapter=path / "llm_adapter",
        named=named.get(_LANGUAGE),
    )
    connector = {
        "kind": _kind(int(settings.get("depth", 2))),
        "weights": str(path / "projector"),
    }
    parts = {
        "vision_tower": _xtuner_tower(tower.pop("path")) | tower,
        "language_model": language,
        "connector": connector,
    }
    return Partial(ModelConfig.model_validate(parts), _template(named))


def _xtuner_part(
    role: str, path: Path, given: str | None, *, whole: Path, adapter: Path, named: str | None
) -> dict[str, str]:
    """Returns the recipe's keys of a part: the model inside, or a base with adapters or none."""
    if (whole / "config.json").is_file():
        if given is not None:
            what = role.replace("_", " ")
            raise ModelError(
                f"this directory holds the whole {what}, so it stands on no other",
                where=f"model.bases.{role}",
                got=given,
                fix=f"leave model.bases.{role} out",
            )
        return {"path": str(whole)}
    if not adapter.is_dir():
        return {"path": _base(role, path, given, named)}
    own = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    return {"path": _base(role, path, given, own, named), "adapter": str(adapter)}


def _llava_pieces(path: Path, bases: BasesConfig) -> Partial:
    """The first stage of LLaVA or MGM (a projector), or LLaVA's LoRA (a projector and adapters)."""
    values = read_json(path / "config.json")
    tower = _base("vision_tower", path, bases.vision_tower, values.get("mm_vision_tower"))
    language: dict[str, str] = {}
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        language["adapter"] = str(path)
        weights = path / "non_lora_trainables.bin"
    else:
        base = values.get("_name_or_path")
        weights = path / "mm_projector.bin"
    language["path"] = _base("language_model", path, bases.language_model, base)
    parts: dict[str, Any] = {
        "vision_tower": {
            "path": tower,
            "layer": int(values.get("mm_vision_select_layer", -1)),
            "select": values.get("mm_vision_select_feature") or "patch",
        },
        "language_model": language,
        "connector": {
            "kind": str(values.get("mm_projector_type", "linear")),
            "weights": str(weights),
        },
    }
    if values.get("mm_vision_tower_aux"):
        # MGM's first stage leaves both towers in the file.
        parts["vision_tower_aux"] = {
            "size_px": values.get("image_size_aux", 768),
            "grid": values.get("image_grid", 1),
            "whole": bool(values.get("image_global", False)),
        }
    padded = values.get("image_aspect_ratio") == "pad"
    return Partial(ModelConfig.model_validate(parts), "vicuna_v1", "pad" if padded else "crop")


def _base(role: str, path: Path, given: str | None, *named: object) -> str:
    """Returns where a part is: as the recipe says, else as the first config that says it.

    Raises:
        ModelError: Nothing says it, or what a config says is not on this machine.
    """
    if given is not None:
        return given
    found = next((str(name) for name in named if name), None)
    # A hub id has one slash: owner/name.
    is_path = found is not None and (found.startswith(("/", ".", "~")) or found.count("/") > 1)
    if found is None or (is_path and not Path(found).expanduser().is_dir()):
        what = role.replace("_", " ")
        raise ModelError(
            f"this holds only what was trained, and the {what} it stands on is not here",
            where=str(path),
            got=f"its config says {found}" if found else "its config does not say which",
            fix=f"set model.bases.{role} (--{role.replace('_', '-')} of chat, eval and export) to"
            f" the {what} it was trained with",
        )
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError("this file cannot be read", where=str(file), got=error) from error


def _xtuner_tower(path: str) -> dict[str, Any]:
    # XTuner takes the layer before the last of every encoder, without its first token.
    return {"path": path, "layer": -2, "select": "patch"}


def _kind(num_linears: int) -> str:
    return "linear" if num_linears == 1 else f"mlp{num_linears}x_gelu"


def _template(named: dict[str, str]) -> str:
    return TEMPLATES.get(named.get("prompt_template", "").rpartition(".")[2], "auto")


def _assignments(text: str, *, where: str) -> dict[str, str]:
    """Returns the texts and dotted names that a Python config assigns; nothing of it is run."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ModelError("the config cannot be read", where=where, got=error) from error
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found[node.targets[0].id] = node.value.value
        elif isinstance(node.value, ast.Attribute):
            found[node.targets[0].id] = ast.unparse(node.value)
    return found
