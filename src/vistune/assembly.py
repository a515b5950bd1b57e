"""Puts parts together: what a recipe or a saved directory names becomes a model and its encoder.

The order never changes: parts -> inherited weights -> tuning (adapters) -> trained weights. It
holds no training state and decides nothing by a directory's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vistune.checkpoint.described import PartsView, on_bases, require_there, view
from vistune.checkpoint.files import INHERITED_NAME
from vistune.checkpoint.fingerprint import require_same_parts
from vistune.checkpoint.layouts import (
    Partial,
    bases_of,
    describe_directory,
    load_directory,
    read_partial,
    told_by_config,
)
from vistune.checkpoint.load import is_partial, read_weights, resolve_checkpoint
from vistune.checkpoint.located import located, pinned
from vistune.checkpoint.manifest import MANIFEST_NAME, Manifest, anchored, read_manifest
from vistune.checkpoint.merge import merge_adapters
from vistune.data.encode import Encoder
from vistune.data.image import ImagePlan
from vistune.data.layout import ImageLayout, load_layout
from vistune.data.template import ChatTemplate, resolve_template
from vistune.errors import CheckpointError, DataError, ModelError
from vistune.models.anyres import tiles_of, with_tiles
from vistune.models.build import build_model, replace_connector
from vistune.models.compose import ComposedVLM
from vistune.models.facts import ModelFacts, describe
from vistune.models.hub import is_hub_id
from vistune.models.tune import apply_tuning, load_trainable
from vistune.recipe import (
    BasesConfig,
    DataConfig,
    ImageConfig,
    ModelConfig,
    QkvOrder,
    Recipe,
    TuneConfig,
)
from vistune.types import ImageDefaults

if TYPE_CHECKING:
    from vistune.models.whole import WholeModel


@dataclass(frozen=True)
class Origin:
    """What a directory of another project may leave out.

    Args:
        bases: The models it stands on.
        template: Chat template; its own, or its family's, when None.
        sat_qkv: Order of rows in SwissArmyTransformer's layout, see `model.sat_qkv`.
    """

    bases: BasesConfig = field(default_factory=BasesConfig)
    template: str | None = None
    sat_qkv: QkvOrder | None = None


_SAYS_IT_ITSELF = Origin()


@dataclass(frozen=True)
class Blueprint:
    """A model that is fully described and not yet loaded.

    Args:
        parts: The parts, free of `from_checkpoint` unless that names a whole model; what is local
            is named from the root.
        facts: Tokenizer, grid and configs of the parts.
        encoder: How text and images become tokens.
        checkpoint: The checkpoint to lay over the parts, or None.
        adds_tiles: Whether `parts.tiles` are new to what is gone on from.
        view: The parts with the small files that the checkpoint keeps, where it does.
        sources: The parts at the places to read them from: hub ids as directories, what a
            checkpoint keeps in the view.
    """

    parts: ModelConfig
    facts: ModelFacts
    encoder: Encoder
    checkpoint: Path | None = None
    adds_tiles: bool = False
    view: PartsView | None = None
    _: KW_ONLY
    sources: ModelConfig

    @property
    def notes(self) -> tuple[str, ...]:
        """What the parts' files say otherwise today than when the checkpoint's run started."""
        return () if self.view is None else self.view.notes


@dataclass
class Assembled:
    """A model ready to answer.

    Args:
        model: The model, adapters merged, in evaluation mode.
        encoder: How text and images become tokens.
        origin: What it was loaded from.
        manifest: The description found there; None for a directory of another project.
        notes: What a person should know of it, one sentence each.
        view: Where the tokenizer was read from; some read their files again when they are saved.
    """

    model: WholeModel
    encoder: Encoder
    origin: Path
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()
    view: PartsView | None = None


def draw(recipe: Recipe) -> Blueprint:
    """Describes the model of a recipe from configs and tokenizer alone; no weights are read.

    Raises:
        ModelError: A part is not there or does not fit.
        CheckpointError: `model.from_checkpoint` is not something vistune can go on from.
    """
    if recipe.model.from_checkpoint is None:
        parts = pinned(anchored(recipe.model))
        sources = located(parts, weights=False)
        facts = describe(sources)
        encoder = _encoder(recipe.data, facts, inherited=None)
        return Blueprint(parts, facts, encoder, sources=sources)
    return _draw_from(Path(recipe.model.from_checkpoint), recipe.data, recipe.model)


def draw_directory(path: Path, origin: Origin = _SAYS_IT_ITSELF) -> Blueprint:
    """Describes what a directory holds: a run, a checkpoint, a whole model, trained pieces of one.

    Args:
        path: The directory, or a file of trained pieces.
        origin: What it does not say itself.

    Raises:
        ModelError: A part is not there or does not fit.
        CheckpointError: The directory is none of these.
        TemplateError: Neither it nor `origin` says how conversations are written.
    """
    data = None
    if origin.template is not None:
        data = DataConfig.model_construct(train=(), template=origin.template)
    asked = ModelConfig(from_checkpoint=str(path), bases=origin.bases, sat_qkv=origin.sat_qkv)
    return _draw_from(path, data, asked)


def stands_on_bases(path: Path) -> bool:
    """Whether a directory holds only what was trained, beside bases that may be named anew.

    Args:
        path: A run, a checkpoint, a model directory, or a file of trained pieces.

    Raises:
        CheckpointError: It is none of these.
    """
    folder = resolve_checkpoint(path)
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder).parts is not None
    return is_partial(folder)


def _draw_from(path: Path, data: DataConfig | None, asked: ModelConfig) -> Blueprint:
    folder, on_hub = _found(path, asked)
    tiles = asked.tiles
    partial = read_partial(folder, asked.bases)
    if partial is not None:
        _refuse(asked, ("connector.weights",), "it brings its own connector", where=folder)
        _refuse(asked, ("sat_qkv", "bases.model"), "it is of another project", where=folder)
        parts = pinned(anchored(partial.parts.model_copy(update={"tiles": tiles})))
        sources = located(parts, weights=False)
        facts = _completed(describe(sources), partial)
        return Blueprint(parts, facts, _encoder(data, facts, inherited=None), sources=sources)
    has_manifest = (folder / MANIFEST_NAME).is_file()
    manifest = read_manifest(folder) if has_manifest else None
    is_checkpoint = manifest is not None and manifest.kind == "checkpoint"
    own_parts = manifest.parts if manifest is not None and is_checkpoint else None
    if manifest is not None:
        keys = [f"bases.{key}" for key in asked.bases.model_dump()]
        if own_parts is not None:
            own_parts, homeless = on_bases(own_parts, asked.bases)
            keys = [*(f"bases.{key}" for key in homeless), "connector.weights"]
        _refuse(asked, [*keys, "sat_qkv"], "it says itself what it is made of", where=folder)
    if own_parts is None:
        whole = {"from_checkpoint": str(path if on_hub else folder), "tiles": None}
        own_parts = asked.model_copy(update=whole | {"bases": bases_of(folder, asked.bases)})
    parts = pinned(anchored(own_parts))
    sources = located(parts, weights=is_checkpoint)
    shown = None
    if manifest is not None and is_checkpoint:
        require_there(sources, manifest.part_fingerprints, checkpoint=folder)
        shown = view(sources, folder)
    sources = sources if shown is None else shown.parts
    facts = describe_parts(sources)
    inherited = None if manifest is None else manifest.encoder
    adds_tiles = tiles is not None and tiles != tiles_of(facts)
    if tiles is not None and adds_tiles:
        facts = with_tiles(facts, tiles, where="model.tiles")
        parts, sources = (p.model_copy(update={"tiles": tiles}) for p in (parts, sources))
    encoder = _encoder(data, facts, inherited=inherited)
    checkpoint = folder if is_checkpoint else None
    return Blueprint(parts, facts, encoder, checkpoint, adds_tiles, shown, sources=sources)


def _found(path: Path, asked: ModelConfig) -> tuple[Path, bool]:
    """Returns the directory that a path or a hub id means, and whether it was a hub id.

    Raises:
        CheckpointError: There is none.
        ModelError: A revision is given of what is on this machine.
    """
    on_hub = is_hub_id(str(path))
    if asked.revision is not None and not on_hub:
        raise ModelError(
            "only what is named by its hub id has revisions",
            where="model.revision",
            got=f"{asked.revision}, of {path}",
            fix="leave model.revision out",
        )
    folder = resolve_checkpoint(path, revision=asked.revision, weights=not on_hub)
    if on_hub and not told_by_config(folder):
        folder = resolve_checkpoint(path, revision=asked.revision)
    return folder, on_hub


def _refuse(asked: ModelConfig, keys: Sequence[str], reason: str, *, where: Path) -> None:
    """Refuses settings that would have no effect on the model gone on from.

    Raises:
        ModelError: One of them is set.
    """
    values = {f"bases.{key}": value for key, value in asked.bases.model_dump().items()}
    values |= {"connector.weights": asked.connector.weights, "sat_qkv": asked.sat_qkv}
    given = [key for key in keys if values[key] is not None]
    if given:
        raise ModelError(
            f"model.{given[0]} has no effect on what model.from_checkpoint names: {reason}",
            where=str(where),
            got=values[given[0]],
            fix=f"leave model.{given[0]} out",
        )


def _completed(facts: ModelFacts, partial: Partial) -> ModelFacts:
    """Adds to the facts of parts what a directory of trained pieces says of its training."""
    mode = partial.mode or facts.image_defaults.mode
    own = facts.template != "auto" or facts.tokenizer.chat_template is not None
    return replace(
        facts,
        image_defaults=replace(facts.image_defaults, mode=mode),
        template=facts.template if own else partial.template,
    )


def describe_parts(parts: ModelConfig) -> ModelFacts:
    """Describes a model from its parts, or from the whole model's directory that they name.

    Args:
        parts: As in a checkpoint's manifest; `from_checkpoint` names a whole model.

    Raises:
        ModelError: A part is not there or does not fit.
    """
    if parts.from_checkpoint is None:
        return describe(parts)
    facts = describe_directory(Path(parts.from_checkpoint), parts.bases, parts.sat_qkv)
    if parts.tiles is None or parts.tiles == tiles_of(facts):
        return facts
    return with_tiles(facts, parts.tiles, where="model.tiles")


def build_parts(
    parts: ModelConfig, facts: ModelFacts, *, seed: int, dtype: torch.dtype
) -> WholeModel:
    """Loads a model from its parts, or from the whole model's directory that they name.

    Args:
        parts: As for `describe_parts`.
        facts: What that found.
        seed: Seed of weights that come from nowhere.
        dtype: Format of the weights.

    Raises:
        WeightsError: Weights are missing, unexpected or of another shape.
    """
    if parts.from_checkpoint is None:
        return build_model(parts, facts, seed=seed, dtype=dtype)
    folder = Path(parts.from_checkpoint)
    model = load_directory(folder, facts, dtype=dtype, bases=parts.bases, sat_qkv=parts.sat_qkv)
    if parts.connector.weights is not None:
        replace_connector(model, Path(parts.connector.weights))
    if parts.tiles is not None and isinstance(model, ComposedVLM) and model.tiles is None:
        model.add_tiles(parts.tiles, seed=seed)
    return model


def _encoder(
    data: DataConfig | None, facts: ModelFacts, *, inherited: dict[str, Any] | None
) -> Encoder:
    """Returns the encoder of a recipe's data section; `auto` takes what is inherited."""
    before = Encoder.from_state(inherited, facts.tokenizer) if inherited else None
    if data is None:
        if before is not None:
            return before
        data = DataConfig.model_construct(train=())
    template, system = None, data.system
    if before is not None and data.template == "auto":
        template, system = before.template, before.system if system is None else system
    defaults = facts.image_defaults
    if before is not None:
        plan = before.image_plan
        defaults = ImageDefaults(plan.size_px, plan.mean, plan.std, plan.resample, plan.mode)
    elif data.template == "auto":
        # A family's template; `auto` again where the tokenizer brings its own.
        data = data.model_copy(update={"template": facts.template})
    layout = _layout(data.image, facts, before)
    if layout is not None:  # it decides on the form of images; squares of an earlier run do not
        defaults = replace(defaults, mode="resize")
    template = template or resolve_template(
        data.template, facts.tokenizer, image_marks=facts.image_marks, adds_bos=facts.adds_bos
    )
    _check_direction(template, facts)
    return Encoder(
        tokenizer=facts.tokenizer,
        template=template,
        image_plan=ImagePlan.resolve(data.image, defaults),
        grid=facts.grid,
        image_token_id=facts.image_token_id,
        system=system,
        layout=layout,
    )


def _check_direction(template: ChatTemplate, facts: ModelFacts) -> None:
    """Refuses a template that disagrees with the model on whether prompts are read both ways.

    Raises:
        DataError: It does.
    """
    if template.both_ways == facts.prompts_both_ways:
        return
    only = "reads prompts both ways" if facts.prompts_both_ways else "reads prompts one way"
    raise DataError(
        f"this model {only}, and the template '{template.name}' is for models that do not",
        where="data.template",
        got=template.name,
        fix="set data.template=auto",
    )


def _layout(config: ImageConfig, facts: ModelFacts, before: Encoder | None) -> ImageLayout | None:
    """Returns how images become tokens where they keep their shape; `auto` is what is inherited.

    Raises:
        DataError: The recipe sets a value that has no effect on this model's images.
    """
    layout = before.layout if before is not None else None
    # Tiles that are new to the model gone on from are in the facts alone.
    if layout is None and facts.layout is not None:
        layout = load_layout(facts.layout)
    if layout is None:
        if config.max_tokens != "auto":
            raise DataError(
                "this model makes every image one square of the same size",
                where="data.image.max_tokens",
                got=config.max_tokens,
                fix="data.image.max_tokens=auto; data.image.size_px sets the side",
            )
        return None
    fixed = {"mode", "size_px", "mean", "std", "resample"}
    wrong = [key for key in sorted(fixed) if getattr(config, key) != "auto"]
    if config.decode != "exact":
        wrong.append("decode")
    if wrong:
        raise DataError(
            "this model takes images at their own shape, as its public processor prepares them",
            where=", ".join(f"data.image.{key}" for key in wrong),
            fix="leave these out; data.image.max_tokens bounds the size of an image",
        )
    layout.require()
    return layout if config.max_tokens == "auto" else layout.limited(config.max_tokens)


def build(blueprint: Blueprint, *, seed: int, dtype: torch.dtype) -> WholeModel:
    """Loads a described model: its parts, then the weights of the checkpoint it goes on from.

    Adapters of that checkpoint are merged, so that what comes out has no adapters.

    Args:
        blueprint: From `draw`.
        seed: Seed of a connector that has no weights yet.
        dtype: Format of the weights.

    Raises:
        WeightsError: Weights are missing, unexpected or of another shape.
    """
    located(blueprint.parts, weights=True)
    parts = blueprint.sources
    if blueprint.adds_tiles:
        parts = parts.model_copy(update={"tiles": None})
    model = build_parts(parts, blueprint.facts, seed=seed, dtype=dtype)
    if blueprint.checkpoint is not None:
        lay_over(model, blueprint.checkpoint, parts=blueprint.sources)
        merge_adapters(model)
    if blueprint.adds_tiles and blueprint.parts.tiles is not None:
        assert isinstance(model, ComposedVLM)
        model.add_tiles(blueprint.parts.tiles, seed=seed)
    return model


def lay_over(model: WholeModel, checkpoint: Path, *, parts: ModelConfig) -> Manifest:
    """Brings a model built from a checkpoint's parts to that checkpoint's state.

    Args:
        model: Built from the checkpoint's parts; changed in place (adapters are added, not merged).
        checkpoint: The checkpoint's directory.
        parts: The parts, where they are now.

    Returns:
        The checkpoint's manifest.

    Raises:
        CheckpointError: What it stands on was changed since the run started, or does not fit.
    """
    manifest = read_manifest(checkpoint)
    # Trained weights on another base would answer, and wrongly.
    require_same_parts(manifest.part_fingerprints, parts, where=checkpoint)
    inherited = checkpoint / INHERITED_NAME
    if inherited.is_file():
        load_weights(model, read_weights(checkpoint, INHERITED_NAME), where=inherited)
    apply_tuning(model, TuneConfig.model_validate(manifest.tune), seed=manifest.seed)
    load_trainable(model, read_weights(checkpoint))
    return manifest


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], *, where: Path) -> None:
    """Copies named weights into a model; every name must be one of the model's.

    Raises:
        CheckpointError: A name or shape does not fit.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    wrong = [n for n, t in state.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(state)} weights do not fit the model built from its parts",
            where=str(where),
            got=", ".join(wrong[:5]),
            fix="the parts were changed since the run; point their paths at the original files",
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def load_assembled(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    origin: Origin = _SAYS_IT_ITSELF,
) -> Assembled:
    """Loads a model to answer with: a run, a checkpoint, an exported directory, a LLaVA directory.

    Args:
        path: Run directory (its newest checkpoint), checkpoint, or model directory.
        dtype: Format of the weights.
        device: Where the model is put.
        origin: What the directory does not say itself.

    Raises:
        CheckpointError: The directory is none of these.
        ModelError: Its parts are not there any more.
    """
    blueprint = draw_directory(Path(path), origin)
    folder = resolve_checkpoint(Path(path))
    has_manifest = (folder / MANIFEST_NAME).is_file()
    seed = read_manifest(folder).seed if has_manifest else 0
    model = build(blueprint, seed=seed, dtype=dtype).to(device=device, dtype=dtype).eval()
    manifest = read_manifest(folder) if has_manifest else None
    return Assembled(model, blueprint.encoder, folder, manifest, blueprint.notes, blueprint.view)
