"""Everything that leans on an interface of another library that may move. Not a place for features.

Each item says what it relies on, in which versions that was checked, and when it can go.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "Decoding",
    "apply_exactly",
    "assert_on_device",
    "attention_named",
    "compiled_flex_attention",
    "computed_buffers",
    "decoder_of",
    "embedding_scale",
    "opaque",
    "register_attention",
    "sdpa_attention_forward",
    "set_recompute",
    "uses_attention_interface",
    "varlen_attention",
    "varlen_repeats_groups",
]


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Files an attention function under `name` for every transformers model.

    Masks of padded batches are made as for torch's SDPA. A 4-D mask reaches the function as it was
    given (transformers 5.17 and 5.23, `_preprocess_mask_arguments`), which packing relies on.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_named(name: str) -> Callable[..., Any]:
    """Returns the attention function filed under `name` (`AttentionInterface`, 5.17 and 5.23)."""
    found: Callable[..., Any] = AttentionInterface()[name]
    return found


def uses_attention_interface(model: Any) -> bool:
    """Whether the classes of a transformers model take their attention from the interface.

    Relies on the class attribute `_supports_attention_backend` (transformers 5.17 and 5.23).
    """
    return bool(getattr(model, "_supports_attention_backend", False))


def decoder_of(language_model: Any) -> nn.Module:
    """Returns the causal language model without its head (`base_model`, 5.17 and 5.23)."""
    decoder = language_model.base_model
    assert isinstance(decoder, nn.Module)
    return decoder


def embedding_scale(embedding: nn.Module) -> float:
    """Returns the factor that an embedding module applies to what it looks up.

    Gemma's embedding module multiplies by the root of the width (`scalar_embed_scale`, 5.17 and
    5.23). Models that multiply inside their forward pass scale image embeddings by themselves.
    """
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def computed_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Returns the floating-point buffers that are computed and not saved: (module, name, buffer).

    Relies on `nn.Module._non_persistent_buffers_set` (torch 2.11 to 2.13).
    """
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_floating_point()
    ]


def apply_exactly(model: nn.Module, apply: Callable[[], object]) -> None:
    """Moves or casts a model, but leaves tables such as rotary frequencies in their precision.

    Loading in 16 bit keeps them exact and casting would not: the same model would then answer
    differently, the more so the longer the text.

    Args:
        model: The model.
        apply: Moves or casts it.
    """
    exact = computed_buffers(model)
    apply()
    for module, name, table in exact:
        moved = module.get_buffer(name)
        if moved.dtype is not table.dtype:
            module.register_buffer(name, table.to(moved.device), persistent=False)


def set_recompute(
    layer: nn.Module,
    *,
    on: bool,
    keeping: Callable[[Tensor], AbstractContextManager[None]] | None = None,
) -> bool:
    """Turns activation checkpointing of one decoder layer on or off.

    Args:
        layer: The layer.
        on: Whether it is computed again in the backward pass.
        keeping: What the layer's input is kept within (`models.offload`), or None.

    Relies on `GradientCheckpointingLayer.gradient_checkpointing` and
    `_gradient_checkpointing_func` (5.17 and 5.23); transformers itself offers only a switch for
    all layers, or for every n-th from 5.23 on.

    Returns:
        False when the layer cannot be checkpointed.
    """
    if not isinstance(layer, GradientCheckpointingLayer):
        return False
    layer.gradient_checkpointing = on
    layer._gradient_checkpointing_func = functools.partial(_recomputed, keeping)
    return True


def recomputes_around_forward(layer: nn.Module) -> bool:
    """Whether a layer that is computed again does so around its `forward`, hooks included.

    transformers did until 5.22; since then `forward` itself recomputes.
    """
    if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing:
        return False
    return "__call__" in vars(GradientCheckpointingLayer)


def _recomputed(
    keeping: Callable[[Tensor], AbstractContextManager[None]] | None,
    function: Callable[..., Any],
    *args: Any,
) -> Any:
    if keeping is None:
        return checkpoint(function, *args, use_reentrant=False)
    # Torch keeps a checkpoint's inputs as saved tensors, to which hooks around it apply (2.11 to
    # 2.13); what the layer itself saves is not kept. Every decoder passes its input first.
    with keeping(args[0]):
        return checkpoint(function, *args, use_reentrant=False)


class Decoding:
    """A padded batch of prompts as transformers' generation hooks see it, step by step.

    Models with positions or masks of their own say so in these hooks, which `generate` of
    transformers calls too. Relies on `_prepare_position_ids_for_generation`,
    `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation` (5.17 and 5.23).

    Args:
        model: A model with `GenerationMixin`.
        input_ids_BT: int64 [B, T].
        attention_mask_BT: int64 [B, T], 0 on padding.
        image_inputs: What the model's forward pass is given for the images.
    """

    def __init__(
        self,
        model: Any,
        *,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_inputs: dict[str, Any],
    ) -> None:
        self._model = model
        self._ids_BT = input_ids_BT
        self._first = True
        self._kwargs: dict[str, Any] = {
            "attention_mask": attention_mask_BT,
            **image_inputs,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        self._kwargs["position_ids"] = model._prepare_position_ids_for_generation(
            input_ids_BT, self._kwargs
        )

    def inputs(self) -> dict[str, Any]:
        """Returns the arguments of the next forward pass."""
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            self._ids_BT,
            next_sequence_length=None if self._first else 1,
            is_first_iteration=self._first,
            **self._kwargs,
        )
        return inputs

    def advance(self, outputs: Any, next_ids_B: Tensor) -> None:
        """Takes in what the pass returned and which tokens were chosen."""
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=False
        )
        self._ids_BT = torch.cat((self._ids_BT, next_ids_B[:, None]), dim=1)
        self._first = False


@functools.cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_repeats_groups() -> bool:
    """Whether grouped key heads are repeated for torch's varlen attention, which costs memory."""
    return not _varlen()[1]


def varlen_attention(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    window: int | None,
    causal: bool = True,
    cu_queries: Tensor | None = None,
    max_queries: int | None = None,
) -> Tensor:
    """Attention within each sample of a packed row, by torch's flash kernel (CUDA, 16 bit).

    Torch 2.13 takes grouped key heads; before it they are repeated here. The shim can go with
    torch 2.12.

    Args:
        query_THD: [T, H, D].
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample.
        scale: Factor on the scores.
        window: Positions a token sees, itself included; None for all before it.
        causal: Whether a position sees only itself and what is before it.
        cu_queries: int32 [S + 1], when there are queries for the last positions of each sample
            only; they are aligned to the sample's end.
        max_queries: Queries of the sample with most of them.

    Returns:
        [T, H, D], one for each query.
    """
    attend, takes_groups = _varlen()
    groups = query_THD.shape[1] // key_THD.shape[1]
    extra: dict[str, Any] = {}
    if groups > 1 and takes_groups:
        extra["enable_gqa"] = True
    elif groups > 1:
        key_THD = key_THD.repeat_interleave(groups, dim=1)
        value_THD = value_THD.repeat_interleave(groups, dim=1)
    left = -1 if window is None else window - 1
    out = attend(
        query_THD,
        key_THD,
        value_THD,
        cu_seqlens if cu_queries is None else cu_queries,
        cu_seqlens,
        max_seqlen if max_queries is None else max_queries,
        max_seqlen,
        scale=scale,
        window_size=(left, 0 if causal else -1),
        **extra,
    )
    assert isinstance(out, Tensor)
    return out


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that torch's compiler calls as it is and never looks into."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    hidden: Callable[..., Any] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return hidden


def compiled_flex_attention() -> Callable[..., Any]:
    """Returns torch's FlexAttention, compiled; it fails where it would run uncompiled.

    Uncompiled it makes all T x T scores, and torch falls back to that without a word after a
    number of variants (`torch._dynamo.config.recompile_limit`, 2.11 to 2.13). A model has few:
    rows of one length and of any, windows, caps, the last layer's positions.
    """
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, fullgraph=True)

    def attend(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64):
            return run(*args, **kwargs)

    return attend


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fails where `condition` is computed, without waiting for it (torch 2.11 to 2.13)."""
    torch._assert_async(condition, message)
