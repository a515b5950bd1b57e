"""Builds a model without memory for its weights and fills it with tensors that were read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn

from vistune.models.families.files import fill


def filled(
    kind: type[nn.Module],
    config: Any,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    where: str,
    public: Mapping[str, str] | None = None,
) -> nn.Module:
    """Returns a model with given weights, in evaluation mode.

    Only weights are built without memory: what a module computes for itself (rotary frequencies,
    position numbers) is real from the start.

    Args:
        kind: The model's class.
        config: Its settings.
        tensors: By the model's names; every one, a tied head left out.
        dtype: Number format of the weights.
        where: The directory, for messages.
        public: What the directory calls the model's tensors, see `fill`.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = kind(config)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    head = "language_model.lm_head.weight"
    if config.tie_word_embeddings:
        tensors[head] = tensors["language_model.model.embed_tokens.weight"]
    fill(model, tensors, where=where, public=public)
    if config.tie_word_embeddings:
        model.tie_weights()
    out = model.eval()
    assert isinstance(out, nn.Module)
    return out
