"""Language models: any causal language model of transformers, loaded strictly.

What is said here of a decoder (its layers, its head, whether packed rows are safe with it) is
either proved by a test for its type or tried out when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import (
    packed_attention,
    packing_mask,
    register_packed_attention,
)
from vistune.models.facts import language_family
from vistune.models.weights import LoadReport, load_strictly
from vistune.recipe import LanguageModelConfig

# Packing and head of these are compared with transformers by this project's tests.
PROVED_TYPES = frozenset(
    {"cohere", "gemma", "gemma2", "granite", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"}
)
_WATCHED = "vistune_watched"
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Buffers that older checkpoints carry and every model computes for itself.
_HARMLESS_KEYS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|position_ids)$")
_SCALED_HEADS: dict[str, tuple[str, Literal["multiply", "divide"]]] = {
    "cohere": ("logit_scale", "multiply"),
    "cohere2": ("logit_scale", "multiply"),
    "granite": ("logits_scaling", "divide"),
    "granitemoe": ("logits_scaling", "divide"),
    "granitemoeshared": ("logits_scaling", "divide"),
}


def load_language_model(
    config: LanguageModelConfig, text_config: Any, *, dtype: torch.dtype
) -> tuple[Any, LoadReport]:
    """Loads a causal language model, ready for packed rows.

    Args:
        config: Where it is.
        text_config: Its config.
        dtype: Format of the weights.

    Returns:
        The model in evaluation mode, and what was loaded.

    Raises:
        WeightsError: Weights are missing, unexpected or of another shape.
        ModelError: Packed rows are not safe with this decoder.
    """
    from transformers import AutoModelForCausalLM

    check_config(text_config, where=config.path)
    family = language_family(config)
    if family is not None:
        model: Any = family.load(Path(config.path).expanduser(), dtype)
        model.config._attn_implementation = register_packed_attention()
        check_model(model, where=config.path)
        return model.eval(), LoadReport(config.path, 0)
    arguments: dict[str, Any] = {"attn_implementation": register_packed_attention()}
    if config.gguf_file is not None:
        arguments["gguf_file"] = config.gguf_file
    else:
        arguments["config"] = text_config
    model, report = load_strictly(
        AutoModelForCausalLM,
        config.path,
        revision=config.revision,
        dtype=dtype,
        harmless=lambda key: _HARMLESS_KEYS.fullmatch(key) is not None,
        key="model.language_model.path",
        **arguments,
    )
    check_model(model, where=config.path)
    return model, report


def check_config(text_config: Any, *, where: str) -> None:
    """Refuses decoders with layers that packed rows are not safe with.

    Raises:
        ModelError: A layer mixes positions other than by full or sliding attention.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if kinds or not getattr(text_config, "is_causal", True):
        raise ModelError(
            f"a '{text_config.model_type}' model mixes positions in ways that would leak between"
            " the samples of a packed row",
            where=where,
            got=", ".join(sorted(kinds)) or "attention in both directions",
            expected=" and ".join(_LAYER_TYPES),
            fix="use another language model",
        )


def check_model(model: Any, *, where: str) -> None:
    """Makes sure that packed rows mean the same to a decoder as samples one by one.

    Raises:
        ModelError: The decoder does not take its attention from transformers' interface, or its
            results differ.
    """
    if not _compat.uses_attention_interface(model):
        raise ModelError(
            f"{type(model).__name__} brings its own attention, which would ignore where a packed"
            " sample ends",
            where=where,
            fix="use another language model",
        )
    if model.config.model_type not in PROVED_TYPES:
        _try_out(model, where=where)


@torch.no_grad()
def _try_out(model: Any, *, where: str) -> None:
    """Compares a packed row of two short samples with transformers' own forward passes."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    lengths = [4, 3]
    limit = min(int(model.config.vocab_size), 100)
    ids = torch.arange(1, 1 + sum(lengths), device=device).remainder(limit)[None]
    training = model.training
    model.eval()
    try:
        expected = torch.cat(
            [model(input_ids=part).logits[0] for part in torch.split(ids, lengths, dim=1)]
        )
        windows: list[int | None] = []
        with _watched_attention(model, windows):
            hidden = _compat.decoder_of(model)(
                inputs_embeds=model.get_input_embeddings()(ids),
                attention_mask=packing_mask(
                    torch.tensor([0, lengths[0], sum(lengths)], device=device), max(lengths)
                ),
                position_ids=torch.cat([torch.arange(n, device=device) for n in lengths])[None],
                use_cache=False,
            ).last_hidden_state[0]
        found = logits_of(model)(hidden)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run on a packed row",
            where=where,
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="use another language model",
        ) from error
    finally:
        model.train(training)
    # fp32 sums in another order differ by about 1e-6; 16-bit formats keep 8 to 11 bits.
    tolerance = 1e-4 if expected.dtype is torch.float32 else 5e-2
    error_frac = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error_frac <= tolerance:
        raise ModelError(
            f"{type(model).__name__} gives other results for a packed row than for its samples",
            where=where,
            got=f"a relative difference of {error_frac:.1e}",
            expected=f"at most {tolerance:.0e}",
            fix="use another language model",
        )
    _check_windows(model, windows, where=where)


@contextmanager
def _watched_attention(model: Any, windows: list[int | None]) -> Iterator[None]:
    """Within this, `windows` gets the sliding window that each layer asks of packed attention."""

    def watched(module: nn.Module, *tensors: Any, **asked: Any) -> tuple[Tensor, None]:
        windows.append(asked.get("sliding_window"))
        return packed_attention(module, *tensors, **asked)

    before = model.config._attn_implementation
    _compat.register_attention(_WATCHED, watched)
    model.config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        model.config._attn_implementation = before
        # What is filed stays filed: it must not hold on to the model.
        _compat.register_attention(_WATCHED, packed_attention)


def _check_windows(model: Any, windows: list[int | None], *, where: str) -> None:
    """Refuses layers whose window is in the mask alone, which a packed row does not have.

    The rows tried out are shorter than any window, so their results do not show it.

    Raises:
        ModelError: A layer slides a window and does not tell attention.
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    if window is None or (longest is not None and window >= longest):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(windows)
    slides = [kind == "sliding_attention" for kind in kinds]
    silent = [n for n, (s, w) in enumerate(zip(slides, windows, strict=False)) if s and w != window]
    if silent:
        raise ModelError(
            f"{type(model).__name__} slides a window of {window} positions that it does not tell"
            " attention, so that longer samples of a packed row would see too much",
            where=where,
            got=f"{len(silent)} of {len(windows)} layers",
            fix="use another language model",
        )


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Returns the function from normalised hidden states to logits, as the model applies it.

    Args:
        model: A causal language model of transformers.

    Returns:
        A function [M, D] -> [M, V].
    """
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    attribute, operation = _SCALED_HEADS.get(str(config.model_type), (None, "multiply"))
    scale = None if attribute is None else getattr(config, attribute)

    def logits(hidden_MD: Tensor) -> Tensor:
        found = model.get_output_embeddings()(hidden_MD)
        if scale is not None:
            found = found * scale if operation == "multiply" else found / scale
        if cap is not None:
            found = torch.tanh(found / cap) * cap
        assert isinstance(found, Tensor)
        return found

    return logits
