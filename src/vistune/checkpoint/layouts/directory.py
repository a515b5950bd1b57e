"""Reads a directory that holds a whole model, whatever its layout or name.

Known are vistune's own layout, transformers' LLaVA, the original LLaVA, the families of
`vistune.models.families` in their public layouts, and transformers' own vision-language models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vistune.checkpoint.layouts import llava_hf, llava_original, vistune_model
from vistune.checkpoint.load import SAT_CONFIG_NAME
from vistune.errors import ModelError
from vistune.models.facts import ModelFacts, read_json
from vistune.recipe import BasesConfig, QkvOrder

if TYPE_CHECKING:
    from vistune.models.whole import WholeModel


class Layout(Protocol):
    """One public layout."""

    def describe(self, folder: Path) -> ModelFacts:
        """Reads configs, preprocessor file and tokenizer; no weights."""
        ...

    def load(self, folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> WholeModel:
        """Loads the model, every weight accounted for."""
        ...


class ComposedLayout(Layout, Protocol):
    """A layout that its config alone tells: a module of this package."""

    NAME: str

    def matches(self, values: dict[str, Any]) -> bool:
        """Whether a directory's config.json is of this layout."""
        ...


_NO_BASES = BasesConfig()
LAYOUTS: tuple[ComposedLayout, ...] = (vistune_model, llava_hf, llava_original)


def layout_of(folder: Path) -> Layout:
    """Returns the layout of a directory.

    Raises:
        ModelError: It holds no model of a known layout.
    """
    if not folder.is_dir():
        raise ModelError(
            "there is no such directory",
            where=str(folder),
            fix="name a run, a checkpoint of it, or a model directory",
        )
    file = folder / "config.json"
    if not file.is_file() and not (folder / SAT_CONFIG_NAME).is_file():
        raise ModelError(
            "this directory has no config.json",
            where=str(folder),
            expected="a run, a checkpoint of it, or a model directory",
        )
    values = read_json(file) if file.is_file() else {}
    for layout in LAYOUTS:
        if layout.matches(values):
            return layout
    # The families' classes cost a second to import, which most runs need not wait for.
    from vistune.checkpoint.layouts import native
    from vistune.checkpoint.layouts.family_model import own_layout, public_layout
    from vistune.models.families import FAMILIES

    if native.matches(values):
        return native
    found = own_layout(values) or public_layout(folder)
    if found is not None:
        return found
    raise ModelError(
        "this is no vision-language model of a layout that vistune reads",
        where=str(file),
        got=f"model_type {values.get('model_type')}, architectures {values.get('architectures')}",
        expected=", ".join([*(layout.NAME for layout in LAYOUTS), *FAMILIES, *native.NAMES]),
        fix="name its parts instead: model.vision_tower.path and model.language_model.path",
    )


def told_by_config(path: Path) -> bool:
    """Whether a directory's small files say all that describes its model, without its weights."""
    from vistune.checkpoint.layouts import native

    file = path / "config.json"
    values = read_json(file) if file.is_file() else {}
    return any(layout.matches(values) for layout in (vistune_model, llava_hf, native))


def bases_of(path: Path, bases: BasesConfig) -> BasesConfig:
    """Returns what a whole model's directory stands on besides, as it or the recipe says.

    Args:
        path: The directory.
        bases: What the recipe says, which goes first.

    Raises:
        ModelError: The recipe names bases of a model that stands on none.
    """
    file = path / "config.json"
    values = read_json(file) if file.is_file() else {}
    if bases != _NO_BASES:
        _require_a_place(bases, llava_original if llava_original.matches(values) else None)
        return bases
    if not llava_original.matches(values):
        return bases
    return BasesConfig(vision_tower=str(values["mm_vision_tower"]))


def _require_a_place(bases: BasesConfig, layout: Layout | None) -> None:
    given = bases.language_model or bases.model
    if layout is not llava_original or given is not None:
        raise ModelError(
            "this directory holds the whole model, so it stands on no other",
            where="model.bases",
            got=given or bases.vision_tower,
            fix="leave model.bases out",
        )


def describe_directory(
    path: Path, bases: BasesConfig = _NO_BASES, sat_qkv: QkvOrder | None = None
) -> ModelFacts:
    """Describes a whole model from its config, preprocessor file and tokenizer.

    Args:
        path: The directory.
        bases: Where the recipe says that models are which the directory names.
        sat_qkv: What the recipe says of the order of rows in SwissArmyTransformer's layout.

    Raises:
        ModelError: It is of no known layout, or a file in it cannot be used, or it is whole and
            stands on no base.
    """
    layout = layout_of(path)
    if sat_qkv is not None and not _is_sat(path):
        raise ModelError(
            "this directory is not in SwissArmyTransformer's layout, whose rows have two orders",
            where="model.sat_qkv",
            got=sat_qkv,
            fix="leave model.sat_qkv out",
        )
    if bases == _NO_BASES:
        return layout.describe(path)
    _require_a_place(bases, layout)
    return llava_original.describe(path, tower_path=bases.vision_tower)


def _is_sat(path: Path) -> bool:
    return (path / SAT_CONFIG_NAME).is_file() and not (path / "config.json").is_file()


def load_directory(
    path: Path,
    facts: ModelFacts,
    *,
    dtype: torch.dtype,
    bases: BasesConfig = _NO_BASES,
    sat_qkv: QkvOrder | None = None,
) -> WholeModel:
    """Loads a whole model.

    Args:
        path: The directory.
        facts: What `describe_directory` found.
        dtype: Format of the weights.
        bases: As for `describe_directory`.
        sat_qkv: As for `describe_directory`.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        WeightsError: Weights are missing, left over or of another shape.
    """
    if sat_qkv is not None:
        from vistune.models.families.visualglm import VisualGLMFamily

        model: WholeModel = VisualGLMFamily().load(path, dtype, sat_qkv=sat_qkv)
    elif bases == _NO_BASES:
        model = layout_of(path).load(path, facts, dtype=dtype)
    else:
        model = llava_original.load(path, facts, dtype=dtype, tower_path=bases.vision_tower)
    model.eval()
    return model
