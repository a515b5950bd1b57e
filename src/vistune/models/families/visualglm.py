"""VisualGLM-6B: recognised by its tensors' names, loaded from either layout; and ChatGLM-6B.

The transformers layout is a directory with `config.json`; the SAT layout has `model_config.json`,
a file `latest` that names a folder, and one weight file in that folder. Which one a directory
holds is read from its files, and which of the two vocabularies from the embedding's size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistune.errors import ModelError, WeightsError
from vistune.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM
from vistune.models.chatglm.tokenizer import VOCABULARY_NAME, ChatGLMTokenizer
from vistune.models.families.contract import FAMILIES
from vistune.models.families.files import CONFIG_NAME, read_config, read_tensors
from vistune.models.families.filling import filled
from vistune.models.visualglm import VisualGLMConfig, VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import chatglm_map, hf_map, sat_map
from vistune.recipe import QkvOrder

SAT_CONFIG_NAME = "model_config.json"
SAT_WEIGHTS_NAME = "mp_rank_00_model_states.pt"
_TEXT = "transformer.word_embeddings.weight"


class VisualGLMFamily:
    """VisualGLM-6B, in the transformers layout and in SwissArmyTransformer's."""

    name = "visualglm-6b"

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether tensors' names are VisualGLM's in one of its layouts."""
        # By groups of names: a single one that is missing shall be named, not hide the family.
        vision = any(key.startswith(("image_encoder.", "mixins.eva.model.")) for key in keys)
        return vision and any(key.startswith("transformer.layers.") for key in keys)

    def settings(self, directory: Path) -> VisualGLMConfig:
        """Returns the config of a model directory in either layout."""
        sat = is_sat(directory)
        where = str(directory / (SAT_CONFIG_NAME if sat else CONFIG_NAME))
        values = read_sat_config(directory) if sat else read_config(directory)
        return VisualGLMConfig.from_public(values, where=where)

    def load(
        self, directory: Path, dtype: torch.dtype, *, sat_qkv: QkvOrder = "blocks"
    ) -> VisualGLMForConditionalGeneration:
        """Loads a model directory, every tensor accounted for.

        Args:
            directory: In either layout.
            dtype: Number format of the weights.
            sat_qkv: SAT layout only: order of ChatGLM's fused rows. "by_head" in checkpoints
                written before July 2023; no file says so, and the wrong one gives nonsense.

        Raises:
            ModelError: The config does not describe a VisualGLM.
            WeightsError: A tensor is missing, left over or of another shape.
        """
        config = self.settings(directory)
        if is_sat(directory):
            where = str(directory / SAT_CONFIG_NAME)
            tensors = read_sat_tensors(directory)
            key_map = sat_map(config, qkv=sat_qkv)
        else:
            where = str(directory / CONFIG_NAME)
            tensors = dict(read_tensors(directory))
            key_map = hf_map(config)
        _check_vocabulary(tensors, config.text_config, where=where)
        own = key_map.from_public(tensors, where=str(directory))
        model = filled(
            VisualGLMForConditionalGeneration,
            config,
            own,
            dtype,
            where=str(directory),
            public=key_map.public_names(),
        )
        assert isinstance(model, VisualGLMForConditionalGeneration)
        return model

    def load_tokenizer(self, directory: Path, *, vocab_size: int) -> ChatGLMTokenizer:
        """Loads the tokenizer of a model directory.

        Args:
            directory: Holds `ice_text.model`.
            vocab_size: Rows of the model's embedding.

        Raises:
            ModelError: The file is missing or does not fit the model.
        """
        return ChatGLMTokenizer.for_vocabulary(directory / VOCABULARY_NAME, vocab_size=vocab_size)


def load_chatglm(directory: Path, dtype: torch.dtype) -> ChatGLMForCausalLM:
    """Loads a ChatGLM-6B without vision, transformers layout, every tensor accounted for.

    It is not registered as a language model to compose with: its mask and positions are its own.

    Args:
        directory: `config.json` and weight files.
        dtype: Number format of the weights.

    Raises:
        ModelError: The config does not describe a ChatGLM-6B.
        WeightsError: A tensor is missing, left over or of another shape.
    """
    where = str(directory / CONFIG_NAME)
    config = ChatGLMConfig.from_public(read_config(directory), where=where)
    tensors = dict(read_tensors(directory))
    _check_vocabulary(tensors, config, where=where)
    key_map = chatglm_map(config)
    own = key_map.from_public(tensors, where=str(directory))
    names = key_map.public_names()
    model = filled(ChatGLMForCausalLM, config, own, dtype, where=str(directory), public=names)
    assert isinstance(model, ChatGLMForCausalLM)
    return model


def is_sat(directory: Path) -> bool:
    """Whether a directory is in SwissArmyTransformer's layout, by the files it holds."""
    return (directory / SAT_CONFIG_NAME).is_file() and not (directory / CONFIG_NAME).is_file()


def read_sat_config(directory: Path) -> dict[str, Any]:
    """Returns the content of a SAT directory's `model_config.json`.

    Raises:
        ModelError: It cannot be read.
    """
    path = directory / SAT_CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError("the model's config cannot be read", where=str(path), got=error) from error
    if not isinstance(config, dict):
        raise ModelError("the model's config is not a JSON object", where=str(path))
    return config


def read_sat_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of a SAT directory by name, mapped from the file.

    Raises:
        WeightsError: Files are missing or damaged, or the model is split over several.
    """
    latest = directory / "latest"
    try:
        folder = directory / latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            "the SAT directory has no file `latest` that names its weights",
            where=str(directory),
        ) from error
    parts = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if [part.name for part in parts] != [SAT_WEIGHTS_NAME]:
        raise WeightsError(
            "the SAT checkpoint is not one file",
            where=str(folder),
            got=", ".join(part.name for part in parts) or "no weight file",
            expected=SAT_WEIGHTS_NAME,
            fix="merge the model-parallel parts with SwissArmyTransformer",
        )
    try:
        # The file also holds the settings it was written with, an argparse namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(parts[0], map_location="cpu", mmap=True, weights_only=True)
        tensors = content["module"]
    except Exception as error:  # half a pickle fails in many ways, all of them the file's fault
        raise WeightsError("a weight file is damaged", where=str(parts[0]), got=error) from error
    return dict(tensors)


def _check_vocabulary(tensors: Mapping[str, Tensor], config: ChatGLMConfig, *, where: str) -> None:
    """Says that config and weights are of different releases before their shapes disagree."""
    rows = tensors[_TEXT].shape[0] if _TEXT in tensors else config.vocab_size
    if rows != config.vocab_size:
        raise ModelError(
            "config and weights have different vocabularies",
            where=where,
            got=f"vocab_size {config.vocab_size} in the config, {rows} rows in {_TEXT}",
            expected="130528 in both (since v1.1) or 150528 in both (first release)",
            fix="use the config and tokenizer that belong to the weights",
        )


FAMILIES.register(VisualGLMFamily.name)(VisualGLMFamily())
