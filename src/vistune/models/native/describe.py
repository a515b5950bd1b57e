"""Reads a directory that holds one of transformers' own vision-language models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from vistune.errors import ModelError
from vistune.models.attention import register_packed_attention
from vistune.models.facts import ModelFacts, processor_template, read_json
from vistune.models.native.contract import (
    NATIVE,
    LooksAhead,
    NativeFamily,
    defaults_of,
    native_name,
)
from vistune.models.native.model import NativeVLM
from vistune.models.weights import hub_error, load_strictly, quiet_transformers

KEY = "model.from_checkpoint"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_native(values: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that is trained through its own class."""
    vision = values.get("vision_config")
    vision_type = vision.get("model_type") if isinstance(vision, dict) else None
    return native_name(values.get("model_type"), vision_type) in NATIVE


def is_native_config(config: Any) -> bool:
    """Whether the config of a whole model is of one that is trained through its own class."""
    vision = getattr(config, "vision_config", None)
    return native_name(config.model_type, getattr(vision, "model_type", None)) in NATIVE


def describe_native(folder: Path) -> ModelFacts:
    """Reads config, image processor and tokenizer; no weights.

    Raises:
        ModelError: A file is missing or cannot be used.
    """
    from transformers import AutoConfig, AutoTokenizer

    # Without its files transformers makes an empty tokenizer of the right class.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            "the directory has no tokenizer",
            where=str(folder),
            expected=" or ".join(_TOKENIZER_FILES),
            fix="download the directory again, with its small files",
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # these files fail in many ways, all of them the user's to mend
        raise hub_error(error, path=str(folder), key=KEY) from error
    family = family_of(config)
    # The processor's template goes before the tokenizer's own, which often knows text alone.
    tokenizer.chat_template = processor_template(folder) or tokenizer.chat_template
    processor = read_processor(folder)
    grid = family.grid(config)
    both_ways = _reads_prompts_both_ways(family)
    return ModelFacts(
        tokenizer=tokenizer,
        image_token_id=family.image_token_id(config),
        grid=grid,
        image_defaults=defaults_of(processor, grid),
        vision_config=config.vision_config,
        text_config=config.get_text_config(),
        tower=None,
        template="paligemma" if both_ways else "auto",
        prompts_both_ways=both_ways,
        layout=family.layout(config, processor, tokenizer),
        image_marks=family.image_marks,
        adds_bos=True,
        whole_config=config,
    )


def _reads_prompts_both_ways(family: NativeFamily) -> bool:
    return isinstance(family, LooksAhead) and family.reads_prompts_both_ways


def read_processor(folder: Path) -> dict[str, Any]:
    """Returns the values of a directory's image processor.

    Raises:
        ModelError: There is no file of one.
    """
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            if "image_processor_type" in values:
                return dict(values)
    raise ModelError(
        "the directory has no file of an image processor",
        where=str(folder),
        expected=" or ".join(_PROCESSOR_FILES),
        fix="download the directory again, with its small files",
    )


def load_native(folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> NativeVLM:
    """Loads the model, every weight accounted for.

    Args:
        folder: The directory.
        facts: What `describe_native` found.
        dtype: Format of the weights.

    Raises:
        WeightsError: A weight is missing, left over or of another shape.
    """
    from transformers import AutoModelForImageTextToText

    packed = register_packed_attention()
    inner, _ = load_strictly(
        AutoModelForImageTextToText,
        str(folder),
        key=KEY,
        dtype=dtype,
        attn_implementation={"text_config": packed, "vision_config": "sdpa"},
    )
    return NativeVLM(inner, family_of(inner.config))


def native_skeleton(facts: ModelFacts) -> NativeVLM:
    """Builds a model without its weights; call it where tensors have no storage.

    Args:
        facts: What `describe_native` found.
    """
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(facts.whole_config)
    return NativeVLM(AutoModelForImageTextToText.from_config(config), family_of(config))


def family_of(config: Any) -> NativeFamily:
    """Returns what is known of a config's family."""
    return NATIVE.get(native_name(config.model_type, config.vision_config.model_type))
