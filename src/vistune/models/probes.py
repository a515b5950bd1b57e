"""How to run a model's decoder, or its way from pixels to embeddings, over any number of units.

For counting on tensors without storage (`models.kept`): nothing here computes. Whole models differ
in what their layers want to be given; the counting does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.chatglm.attention import PackedPrefixes, rotary_tables
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration
from vistune.models.cogvlm2.tokens import ExpertRoute
from vistune.models.compose import ComposedVLM
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.visualglm import VisualGLMConfig, VisualGLMForConditionalGeneration

PlannedModel: TypeAlias = (
    ComposedVLM
    | CogVLM2ForConditionalGeneration
    | MGMForConditionalGeneration
    | VisualGLMForConditionalGeneration
)
"""A model whose memory can be predicted."""
Probe: TypeAlias = Callable[[int], Tensor]
_PROBE = "vistune_probe"


def family_skeleton(config: Any) -> PlannedModel:
    """Builds a model of a family; call it where tensors have no storage.

    Args:
        config: `ModelFacts.whole_config`.

    Raises:
        ModelError: Models of this kind cannot be planned.
    """
    if isinstance(config, CogVLM2Config):
        return CogVLM2ForConditionalGeneration(config)
    if isinstance(config, MGMConfig):
        return MGMForConditionalGeneration(config)
    if isinstance(config, VisualGLMConfig):
        return VisualGLMForConditionalGeneration(config)
    raise ModelError(
        "the memory of a model of this kind cannot be predicted",
        where="model",
        got="a model that transformers reads" if config is None else type(config).__name__,
        expected="tower, connector and language model, or CogVLM2, MGM or VisualGLM",
        fix="set batch.max_tokens and train.checkpoint_layers to numbers",
    )


def decoder_probe(model: PlannedModel, *, stream: torch.dtype, below: bool) -> Probe:
    """Returns a pass of the decoder's layers over one sample of so many tokens.

    Args:
        model: In training mode.
        stream: Format of the embeddings.
        below: Whether something before the decoder trains.
    """
    if isinstance(model, CogVLM2ForConditionalGeneration):
        return _cogvlm2(model, stream=stream, below=below)
    if isinstance(model, VisualGLMForConditionalGeneration):
        return _chatglm(model, stream=stream, below=below)
    # Transformers takes tensors without storage for a trace and would make a T x T mask, of which
    # the packed kernels have none; one of four dimensions is handed on as it is.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    config: Any = _compat.decoder_of(model.language_model).config
    _compat.register_attention(_PROBE, _causal_attention)
    config._attn_implementation = _PROBE

    def run(num_tokens: int) -> Tensor:
        out: Any = _compat.decoder_of(model.language_model)(
            inputs_embeds=_embeds(num_tokens, config.hidden_size, stream, below)[None],
            attention_mask=no_mask,
            position_ids=torch.arange(num_tokens)[None],
            use_cache=False,
        )
        states: Tensor = out.last_hidden_state
        return states

    return run


def image_probe(model: PlannedModel, side_px: int) -> Probe:
    """Returns the way of so many images from pixels to embeddings.

    Args:
        model: In training mode.
        side_px: Side of an image.
    """
    if isinstance(model, ComposedVLM):
        see: Callable[[Tensor], Tensor] = model.image_features
    elif isinstance(model, CogVLM2ForConditionalGeneration):
        see = model.model.image_features
    else:
        see = model.image_embeddings
    return lambda num_images: see(torch.zeros(num_images, 3, side_px, side_px))


def attention_bytes(model: PlannedModel, *, dtype: torch.dtype) -> int:
    """Bytes for each token and layer that packed attention keeps and the probe's does not.

    Grouped key heads repeated for every query head, where the kernel wants them so; of ChatGLM the
    prompts' keys and values once more, taken as all tokens.
    """
    if isinstance(model, CogVLM2ForConditionalGeneration):
        return 0  # transformers' attention, which the probe runs, repeats them too
    if isinstance(model, VisualGLMForConditionalGeneration):
        return 2 * dtype.itemsize * int(model.config.text_config.hidden_size)
    config = _compat.decoder_of(model.language_model).config
    return repeated_bytes(config, dtype=dtype)


def repeated_bytes(config: Any, *, dtype: torch.dtype) -> int:
    """Bytes for each token of keys and values repeated for every query head, where they are.

    Args:
        config: Of the decoder.
        dtype: Format of activations.
    """
    heads = int(config.num_attention_heads)
    grouped = int(getattr(config, "num_key_value_heads", None) or heads) < heads
    if not grouped or dtype is torch.float32 or not _compat.varlen_repeats_groups():
        return 0
    head_width = int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)
    return 2 * dtype.itemsize * heads * head_width


def _embeds(num_tokens: int, width: int, stream: torch.dtype, below: bool) -> Tensor:
    return torch.zeros(num_tokens, int(width), dtype=stream, requires_grad=below)


def _cogvlm2(model: CogVLM2ForConditionalGeneration, *, stream: torch.dtype, below: bool) -> Probe:
    """Half of the tokens are an image's: what is kept does not depend on the share."""

    def run(num_tokens: int) -> Tensor:
        is_vision = torch.arange(num_tokens) < num_tokens // 2
        return model.model.decode(
            _embeds(num_tokens, model.config.hidden_size, stream, below),
            route=ExpertRoute.of(is_vision, num_vision=num_tokens // 2),
            position_ids_BT=torch.arange(num_tokens)[None],
            mask=None,
        )

    return run


def _chatglm(
    model: VisualGLMForConditionalGeneration, *, stream: torch.dtype, below: bool
) -> Probe:
    """One sample whose last token alone is the answer, so that no T x T mask is made."""
    decoder, config = model.language_model.model, model.config.text_config

    def run(num_tokens: int) -> Tensor:
        places = torch.arange(num_tokens)
        bounds = torch.zeros(2, dtype=torch.int32)
        mask = PackedPrefixes(
            ((0, num_tokens - 1, num_tokens),), places, places, places, bounds, bounds, bounds
        )
        tables = rotary_tables(torch.stack((places, places))[None], config)
        states: Tensor = _embeds(num_tokens, config.hidden_size, stream, below)[None]
        for layer in decoder.layers:
            states = layer(states, tables=tables, mask=mask)
        out: Tensor = decoder.norm(states)
        return out

    return run


def _causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one sample, which keeps what the packed kernels keep: q, k, v, sums, result."""
    out = F.scaled_dot_product_attention(
        query, key, value,
        is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None
