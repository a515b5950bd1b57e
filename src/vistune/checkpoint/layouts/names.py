"""Renaming between a public layout and the composed model; every weight is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.towers.load import is_left_out
from vistune.models.weights import check_keys, quiet_transformers

VISION, CONNECTOR, LANGUAGE = "vision_tower.", "connector.", "language_model."
NEWLINE = "tiles.image_newline"


def fill_model(
    config: ComposedConfig,
    tensors: Mapping[str, Tensor],
    rename: Callable[[str], str],
    back: Callable[[str], str],
    *,
    dtype: torch.dtype,
    where: str,
) -> ComposedVLM:
    """Builds a composed model from weights of another layout.

    Args:
        config: What the model is made of.
        tensors: Weights by their public names.
        rename: Public name -> name in the composed model.
        back: The other way, for what is missing.
        dtype: Format of the weights.
        where: Directory, for messages.

    Returns:
        The model, in evaluation mode.

    Raises:
        WeightsError: A weight is missing, left over, of another shape, or named twice.
    """
    plan = config.tower_plan
    state: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    twice = []
    for public, tensor in tensors.items():
        name = rename(public)
        inner = name.removeprefix(VISION)
        if inner != name and is_left_out(inner, config.vision_config, plan):
            continue
        if name.endswith(".rotary_emb.inv_freq"):  # every model computes it for itself
            continue
        if name in state:
            twice.append(public)
        state[name], named[name] = tensor, public
    check_keys(unexpected=twice, where=where)
    with quiet_transformers():
        model, info = ComposedVLM.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_keys(
        missing=[back(name) for name in info["missing_keys"]],
        unexpected=[named.get(name, name) for name in info["unexpected_keys"]],
        mismatched=[(named.get(name, name), *shapes) for name, *shapes in info["mismatched_keys"]],
        where=where,
    )
    assert isinstance(model, ComposedVLM)
    model.eval()
    return model


def model_state(model: ComposedVLM) -> dict[str, Tensor]:
    """Returns a model's weights, each tied one once."""
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.all_tied_weights_keys else set()
    return {name: tensor for name, tensor in state.items() if name not in tied}
