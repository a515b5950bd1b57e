"""Which transformers decoders have a fused form, and how it is read off their modules.

A layer it does not understand is refused by name, never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vistune.models.attention import Scoring
from vistune.models.fused.layer import FusedLayer, HeadNorms, Norm
from vistune.models.fused.projection import Adapter, Projection, Trained, base_of
from vistune.models.fused.torch_ops import Activation


@dataclass(frozen=True)
class _Kind:
    """What is particular to one class of decoder layer.

    Args:
        unit_offset: Norm weights are stored minus one.
        norm_eps: Where a norm keeps its epsilon.
        sandwich: Norms behind attention and MLP too.
    """

    unit_offset: bool = False
    norm_eps: str = "variance_epsilon"
    sandwich: bool = False


_KINDS = {
    "LlamaDecoderLayer": _Kind(),
    "MistralDecoderLayer": _Kind(),
    "Qwen2DecoderLayer": _Kind(),
    "Qwen3DecoderLayer": _Kind(),
    "GemmaDecoderLayer": _Kind(unit_offset=True, norm_eps="eps"),
    "Gemma2DecoderLayer": _Kind(unit_offset=True, norm_eps="eps", sandwich=True),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class NotFusable(Exception):  # noqa: N818  (a reason, not an error: the caller falls back by name)
    """Why a decoder cannot take the fused path."""


def why_not_fusable(decoder: nn.Module) -> str | None:
    """Returns why a decoder cannot take the fused path, or None when it can; changes nothing."""
    try:
        refuse(decoder)
    except NotFusable as reason:
        return str(reason)
    return None


def refuse(decoder: nn.Module) -> None:
    """Refuses decoders without a fused form.

    Raises:
        NotFusable: A layer is of an unknown class, trains only some of its base weights, is held in
            another format, or has adapters with DoRA or with unlike dropout.
    """
    for module in decoder.layers:  # type: ignore[union-attr]
        _check(module, decoder.config)


def fused_layer(module: Any, config: Any, index: int) -> FusedLayer:
    """Reads the fused form off a layer that was not refused; it merges the layer's weights.

    Args:
        module: The layer.
        config: The decoder's config.
        index: Its number.
    """
    kind = _KINDS[type(module).__name__]
    attention, mlp = module.self_attn, module.mlp
    width = attention.head_dim
    qkv = _project(attention.q_proj, attention.k_proj, attention.v_proj)
    num_heads = base_of(attention.q_proj).out_features // width
    num_kv_heads = base_of(attention.k_proj).out_features // width
    head_norms, scoring = _head_norms(attention, kind), _scoring(attention, config, index)
    # What all keys share may leave them only if nothing bends keys or scores after it is added.
    if qkv.bias_O is not None and head_norms is None and scoring.softcap is None:
        qkv.held_back = (num_heads * width, (num_heads + num_kv_heads) * width)
    before_mlp = module.pre_feedforward_layernorm if kind.sandwich else None
    return FusedLayer(
        qkv=qkv,
        out=_project(attention.o_proj),
        gate_up=_project(mlp.gate_proj, mlp.up_proj),
        down=_project(mlp.down_proj),
        norm1=_norm(module.input_layernorm, kind),
        norm2=_norm(before_mlp or module.post_attention_layernorm, kind),
        activation=_activation(mlp),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=width,
        head_norms=head_norms,
        post1=_norm(module.post_attention_layernorm, kind) if kind.sandwich else None,
        post2=_norm(module.post_feedforward_layernorm, kind) if kind.sandwich else None,
        scoring=scoring,
    )


def _check(module: Any, config: Any) -> None:
    name = type(module).__name__
    if name not in _KINDS:
        raise NotFusable(f"layers of class {name} have no fused form (known: {', '.join(_KINDS)})")
    _check_trained(module)
    for linear in itertools.chain(*(merged.values() for merged in _products(module))):
        if type(base_of(linear)) is not nn.Linear:
            raise NotFusable(f"weights are held as {type(base_of(linear)).__name__}")
        if linear is base_of(linear):
            continue
        if any(linear.use_dora.values()) or len(linear.active_adapters) != 1 or linear.merged:
            raise NotFusable("adapters are merged, several, or DoRA")
    for merged in _products(module):
        _check_dropout(merged)
    _activation(module.mlp)
    if float(getattr(config, "attention_dropout", 0.0) or 0.0) > 0 and module.training:
        raise NotFusable("attention weights are dropped while it trains")
    width = int(module.self_attn.head_dim)
    if width % 2:
        raise NotFusable(f"heads are {width} wide")


def _check_trained(module: nn.Module) -> None:
    """Refuses a layer of which only some base weights train."""
    trains = {
        name: parameter.requires_grad
        for name, parameter in module.named_parameters()
        if ".lora_" not in name
    }
    if len(set(trains.values())) > 1:
        named = next(name for name, wanted in trains.items() if wanted)
        raise NotFusable(f"only some base weights train ({named})")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            raise NotFusable(f"a trained weight is not held in fp32 ({name})")


def _check_dropout(merged: dict[str, Any]) -> None:
    """Refuses adapters that cannot read their common input through one mask."""
    found = {}
    for name, linear in merged.items():
        if linear is not base_of(linear):
            dropout = _dropout(linear)
            found[name] = 0.0 if dropout is None else dropout.p
    if len(set(found.values())) > 1:
        each = ", ".join(f"{name} {p:g}" for name, p in found.items())
        raise NotFusable(f"adapters of one merged product have unlike dropout ({each})")


def _products(module: Any) -> tuple[dict[str, Any], ...]:
    """Linear modules by name, those that are merged together."""
    a, m = module.self_attn, module.mlp
    return (
        {"q_proj": a.q_proj, "k_proj": a.k_proj, "v_proj": a.v_proj},
        {"o_proj": a.o_proj},
        {"gate_proj": m.gate_proj, "up_proj": m.up_proj},
        {"down_proj": m.down_proj},
    )


def _dropout(linear: Any) -> nn.Dropout | None:
    """Returns the module in front of a linear layer's adapter, or None where there is none."""
    found = linear.lora_dropout[linear.active_adapters[0]]
    if isinstance(found, nn.Identity):
        return None
    if not isinstance(found, nn.Dropout):
        raise NotFusable(f"adapters drop by {type(found).__name__}")
    return found


def _activation(mlp: Any) -> Activation:
    """Reads it off the module: a model may give it another one than its config names."""
    found = mlp.act_fn
    if isinstance(found, nn.GELU):
        return "gelu_tanh" if found.approximate == "tanh" else "gelu"
    for name, activation in _ACTIVATIONS.items():
        if type(found) is type(ACT2FN[name]):
            return activation
    raise NotFusable(f"activation {type(found).__name__} has no fused form")


def _scoring(attention: Any, config: Any, index: int) -> Scoring:
    width = attention.head_dim
    scale = float(attention.scaling)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        window = None
    cap = getattr(attention, "attn_logit_softcapping", None)
    return Scoring(None if scale == width**-0.5 else scale, window, cap)


def _norm(module: Any, kind: _Kind) -> Norm:
    weight: Tensor = module.weight
    eps = float(getattr(module, kind.norm_eps))
    return Norm(weight.data, eps, kind.unit_offset, weight if weight.requires_grad else None)


def _head_norms(attention: Any, kind: _Kind) -> HeadNorms | None:
    if getattr(attention, "q_norm", None) is None:
        return None
    return HeadNorms(_norm(attention.q_norm, kind), _norm(attention.k_norm, kind))


def _project(*linears: Any) -> Projection:
    """Merges projections that read the same input; each keeps its parameters, as views."""
    bases = [base_of(linear) for linear in linears]
    edges = [0]
    for base in bases:
        edges.append(edges[-1] + base.out_features)
    spans = list(itertools.pairwise(edges))
    weight = _merged([base.weight for base in bases], spans)
    biases = [base.bias for base in bases if base.bias is not None]
    bias = _merged(biases, spans) if biases else None
    adapters = []
    for linear, base, (start, stop) in zip(linears, bases, spans, strict=True):
        if linear is base:
            continue
        name = linear.active_adapters[0]
        down, up = linear.lora_A[name].weight, linear.lora_B[name].weight
        adapters.append(Adapter(down, up, linear.scaling[name], start, stop, _dropout(linear)))
    return Projection(
        weight,
        bias,
        tuple(adapters),
        _trained([base.weight for base in bases], spans),
        _trained(biases, spans) if biases else (),
    )


def _merged(parameters: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Returns parameters end to end in one storage, which they become views of."""
    if len(parameters) == 1:
        return parameters[0].data
    merged = torch.cat([p.data for p in parameters])
    for parameter, (start, stop) in zip(parameters, spans, strict=True):
        parameter.data = merged[start:stop]
    return merged


def _trained(parameters: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> tuple[Trained, ...]:
    return tuple(
        Trained(parameter, *span)
        for parameter, span in zip(parameters, spans, strict=True)
        if parameter.requires_grad
    )
