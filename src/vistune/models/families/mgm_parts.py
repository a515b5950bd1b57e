"""An MGM put together from Gemma, CLIP and OpenCLIP's ConvNeXt, as its first stage starts.

Also MGM's `mm_projector.bin`: what its first stage leaves behind, which is the projector, the
mining and both towers. Reading a whole public MGM stands in `vistune.models.families.mgm`.

Source: MGM's first stage; the file holds every weight whose name holds `mm_projector`, `vlm_uni` or
`vision_tower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, GemmaConfig

from vistune.errors import ModelError, WeightsError
from vistune.models.connector_weights import read_tensors_of
from vistune.models.facts import ModelFacts, read_json, read_text_config, read_vision_config
from vistune.models.families.describe import facts_of
from vistune.models.families.files import check_names, read_tensors
from vistune.models.families.filling import filled
from vistune.models.keymap import Entry, KeyMap
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map, open_clip_map
from vistune.models.mgm.mining import MGMConnector
from vistune.models.weights import load_strictly
from vistune.recipe import LanguageModelConfig, ModelConfig, VisionTowerConfig

_TRUNK = "visual.trunk."
_PUBLIC_AUX = "model.vision_tower_aux.vision_"
_TOWER_KEY = "model.vision_tower.path"
_AUX_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
_WRAPPED = "base_model.model."
_PARTS_OF_THE_BIN = ("connector.", "vision_tower.", "vision_tower_aux.")


def describe_mgm(config: ModelConfig) -> ModelFacts:
    """Describes an MGM that is put together from parts.

    Args:
        config: Parts with `vision_tower_aux`.

    Raises:
        ModelError: A part is missing or is not of the kind that MGM takes.
    """
    _, language = _parts(config)
    return facts_of(_config(config), Path(language.path).expanduser())


def build_mgm(config: ModelConfig, *, seed: int, dtype: torch.dtype) -> MGMForConditionalGeneration:
    """Loads the parts of an MGM; mining and projector are drawn, or read from their file.

    Args:
        config: Parts with `vision_tower_aux`.
        seed: Seed of mining and projector.
        dtype: Format of the weights.

    Raises:
        ModelError: A part is missing or is not of the kind that MGM takes.
        WeightsError: A tensor is missing, left over or of another shape.
    """
    tower, language = _parts(config)
    settings = _config(config)
    state = _gemma(language, settings) | _clip(tower, settings)
    assert config.vision_tower_aux is not None
    if config.vision_tower_aux.path is not None:
        folder = Path(config.vision_tower_aux.path).expanduser()
        trunk = {n: t for n, t in _aux_tensors(folder).items() if _is_used(n)}
        state |= open_clip_map(settings).from_public(trunk, where=str(folder))
    if config.connector.weights is None:
        state |= _drawn_connector(settings, seed=seed)
    else:
        file = Path(config.connector.weights)
        state |= read_mgm_connector(file, settings)
    model = filled(MGMForConditionalGeneration, settings, state, dtype, where=language.path)
    assert isinstance(model, MGMForConditionalGeneration)
    return model


def replace_mgm_connector(model: MGMForConditionalGeneration, path: Path) -> None:
    """Puts the content of an `mm_projector.bin` into an MGM: mining, projector, towers if there.

    Args:
        model: Changed in place.
        path: The file.

    Raises:
        WeightsError: The file holds something else, or does not fit this model.
    """
    state = read_mgm_connector(path, model.config)
    own = model.state_dict()
    wrong = [f"{n} {tuple(t.shape)}" for n, t in state.items() if t.shape != own[n].shape]
    if wrong:
        raise WeightsError(
            f"{len(wrong)} tensors have another shape than the model's",
            where=str(path),
            got="; ".join(wrong[:5]),
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def read_mgm_connector(path: Path, config: MGMConfig) -> dict[str, Tensor]:
    """Reads MGM's `mm_projector.bin`, or a run's own connector, under our names.

    Args:
        path: The file, or the checkpoint of a run that trained the connector alone.
        config: The model's.

    Returns:
        Mining and projector, and each tower that the file holds; a tower is there whole or not.

    Raises:
        WeightsError: A tensor is missing or left over; they are listed.
    """
    tensors = {n.removeprefix(_WRAPPED): t for n, t in read_tensors_of(path).items()}
    whole = mgm_map(config)
    own = {name for entry in whole.entries for name in entry.own if name.startswith("connector.")}
    if all(name.startswith("connector.") for name in tensors):  # of a run's own checkpoint
        check_names(own, tensors.keys(), where=str(path))
        return tensors
    entries: list[Entry] = []
    for part in _PARTS_OF_THE_BIN:
        of_part = [e for e in whole.entries if e.own[0].startswith(part)]
        if part == "connector." or any(entry.public in tensors for entry in of_part):
            entries += of_part
    named = KeyMap("MGM mm_projector.bin", tuple(entries), whole.unread)
    return named.from_public(tensors, where=str(path))


def _parts(config: ModelConfig) -> tuple[VisionTowerConfig, LanguageModelConfig]:
    tower, language = config.vision_tower, config.language_model
    assert tower is not None and language is not None
    unused = {
        "model.vision_tower.adapter": tower.adapter,
        "model.language_model.adapter": language.adapter,
        "model.language_model.gguf_file": language.gguf_file,
    }
    given = [key for key, value in unused.items() if value is not None]
    if given or config.connector.pixel_shuffle != 1:
        raise ModelError(
            "an MGM put together from parts does not take this",
            where=given[0] if given else "model.connector.pixel_shuffle",
            fix="leave it out",
        )
    if not Path(language.path).expanduser().is_dir():
        raise ModelError(
            "an MGM is put together from local directories",
            where="model.language_model.path",
            got=language.path,
            fix="download the language model and name its directory",
        )
    return tower, language


def _config(config: ModelConfig) -> MGMConfig:
    tower, language = _parts(config)
    aux = config.vision_tower_aux
    assert aux is not None
    text, vision = read_text_config(language), read_vision_config(tower)
    if not isinstance(text, GemmaConfig) or not isinstance(vision, CLIPVisionConfig):
        raise ModelError(
            "an MGM is made of Gemma and CLIP",
            where="model.vision_tower_aux",
            got=f"{text.model_type} and {vision.model_type}",
            expected="gemma and clip_vision_model",
            fix="leave model.vision_tower_aux out for a model of other parts",
        )
    where = aux.path or config.connector.weights
    if where is None:
        raise ModelError(
            "there is no high-resolution tower",
            where="model.vision_tower_aux.path",
            fix="name OpenCLIP's ConvNeXt, or a model.connector.weights that holds it",
        )
    if aux.path is not None:
        trunk = _aux_tensors(Path(aux.path).expanduser())
        found = {f"{_PUBLIC_AUX}{n.removeprefix(_TRUNK)}": t for n, t in trunk.items()}
    else:
        found = {n.removeprefix(_WRAPPED): t for n, t in read_tensors_of(Path(where)).items()}
    layer = -2 if tower.layer == "auto" else tower.layer
    settings = {
        **read_json(Path(language.path).expanduser() / "config.json"),
        "vision_tower": {**vision.to_dict(), "mm_vision_select_layer": layer},
        "mm_projector_type": config.connector.kind,
        "image_size_aux": aux.size_px,
        "image_grid": aux.grid,
        "image_global": aux.whole,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    return MGMConfig.from_public(settings, shapes, where=where)


def _gemma(language: LanguageModelConfig, config: MGMConfig) -> dict[str, Tensor]:
    folder = Path(language.path).expanduser()
    tensors = dict(read_tensors(folder))
    head = tensors.pop("lm_head.weight", None)
    table = tensors.get("model.embed_tokens.weight")
    if head is not None and (table is None or not torch.equal(head, table)):
        raise WeightsError(
            "the head is not tied to the embeddings, as Gemma's is", where=str(folder)
        )
    of_gemma = [e for e in mgm_map(config).entries if e.own[0].startswith("language_model.")]
    return KeyMap("Gemma", tuple(of_gemma)).from_public(tensors, where=str(folder))


def _clip(tower: VisionTowerConfig, config: MGMConfig) -> dict[str, Tensor]:
    model, _ = load_strictly(
        CLIPVisionModel,
        tower.path,
        key=_TOWER_KEY,
        dtype=torch.float32,
        revision=tower.revision,
        harmless=_is_not_of_the_tower,
        config=config.vision_config,
    )
    return {f"vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}


def _is_not_of_the_tower(key: str) -> bool:
    others = ("text_model.", "logit_scale", "visual_projection.", "text_projection.")
    return key.startswith(others) or key.endswith("position_ids")


def _aux_tensors(folder: Path) -> Mapping[str, Tensor]:
    file = next((folder / n for n in _AUX_FILES if (folder / n).is_file()), None)
    if file is None:
        raise ModelError(
            "this directory holds no OpenCLIP weights",
            where=str(folder),
            expected=" or ".join(_AUX_FILES),
            fix="set model.vision_tower_aux.path",
        )
    return read_tensors_of(file)


def _is_used(name: str) -> bool:
    """Whether a weight of OpenCLIP's is one that MGM keeps: the trunk's stem and stages."""
    return name.startswith((f"{_TRUNK}stem.", f"{_TRUNK}stages."))


def _drawn_connector(config: MGMConfig, *, seed: int) -> dict[str, Tensor]:
    assert config.aux_widths is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn: Any = MGMConnector(
            config.vision_config.hidden_size,
            sum(config.aux_widths),
            config.text_config.hidden_size,
            kind=config.connector,
        )
    return {f"connector.{name}": tensor for name, tensor in drawn.state_dict().items()}
