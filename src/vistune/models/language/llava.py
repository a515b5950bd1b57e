"""The language model inside an original LLaVA: its config and the names of its tensors.

LLaVA's config is its language model's with its own keys among them, and the language model's
tensors keep their names. What else a directory holds (projector, tower, newline) is named here so
that it can be told from what does not belong there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistune.errors import ModelError

TEXT_TYPES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
}
"""Classes of the original code -> types of their language models."""
TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"


def is_original_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original LLaVA.

    Args:
        config: Its content.
    """
    return "mm_vision_tower" in config and _architecture(config) in TEXT_TYPES


def text_type_of(config: Mapping[str, Any]) -> str:
    """Returns the type of the language model in an original LLaVA.

    Raises:
        ModelError: The config is of something else.
    """
    named = _architecture(config)
    if named not in TEXT_TYPES:
        raise ModelError(
            "this is no LLaVA of the original code",
            where="config.json: architectures",
            got=named or None,
            expected=", ".join(TEXT_TYPES),
        )
    return TEXT_TYPES[named]


def llava_text_config(config: Mapping[str, Any]) -> Any:
    """Returns the config of the language model in an original LLaVA.

    Args:
        config: The content of its config.json.

    Raises:
        ModelError: The config is of something else.
    """
    from transformers import AutoConfig

    text_type = text_type_of(config)
    known = set(AutoConfig.for_model(text_type).to_dict())
    own = {key: value for key, value in config.items() if key in known}
    own |= {"architectures": None, "model_type": text_type}
    stored = config.get("dtype", config.get("torch_dtype"))
    if stored is not None:
        own["dtype"] = stored
    if "rope_theta" in config:  # older configs have it beside rope_scaling
        own["rope_theta"] = config["rope_theta"]
    return AutoConfig.for_model(**own)


def is_of_language_model(name: str) -> bool:
    """Whether a tensor of an original LLaVA is of its language model."""
    return not name.startswith((TOWER, PROJECTOR)) and name != NEWLINE


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or [""]
    return str(named[0])
