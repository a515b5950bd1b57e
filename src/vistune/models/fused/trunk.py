"""Finds the fused layers of a transformers decoder: which it understands, and why not the others.

The decoder keeps its parameters; merged weights are the storage its own projections point into, so
generation, adapters and checkpoints see nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models.attention import AUTO, Backend, attend_packed, attend_tail
from vistune.models.fused import torch_ops
from vistune.models.fused.layer import Attention, FusedLayer, run_layer
from vistune.models.fused.projection import Adapter, Fp8Linear, Projection
from vistune.models.fused.tail import TailLayer, run_tail
from vistune.models.fused.torch_ops import Activation
from vistune.types import Tail


@dataclass(frozen=True)
class _Kind:
    """What is particular to one class of decoder layer."""

    unit_offset: bool = False
    norm_eps: str = "variance_epsilon"


_KINDS = {
    "LlamaDecoderLayer": _Kind(),
    "MistralDecoderLayer": _Kind(),
    "Qwen2DecoderLayer": _Kind(),
    "GemmaDecoderLayer": _Kind(unit_offset=True, norm_eps="eps"),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class NotFusable(Exception):  # noqa: N818  (a reason, not an error: the caller falls back by name)
    """Why a decoder cannot take the fused path."""


@dataclass
class FusedTrunk:
    """All layers of a decoder, fused.

    Args:
        layers: In order.
        tail: The last of them once more, for rows whose targets are known.
        rotary: The decoder's rotary table module.
        norm: The decoder's final norm.
        ops: `torch_ops` or `triton_ops`.
        num_recomputed: Layers, from the first, that are computed again in the backward pass.
        backend: How attention is computed.
    """

    layers: list[FusedLayer]
    tail: TailLayer
    rotary: nn.Module
    norm: nn.Module
    ops: ModuleType
    num_recomputed: int = 0
    backend: Backend = AUTO

    def hidden_states(
        self, embeds_BTD: Tensor, position_ids_BT: Tensor, *, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Runs all layers and the final norm over one packed row [1, T, D]."""
        x_TD, cos, sin = self._open(embeds_BTD, position_ids_BT)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend_packed(
                query,
                key,
                value,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                backend=self.backend,
            )

        out: Tensor = self.norm(self(x_TD, cos, sin, attention=attention)[None])
        return out

    def target_states(
        self,
        embeds_BTD: Tensor,
        position_ids_BT: Tensor,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
        tail: Tail,
    ) -> Tensor:
        """As `hidden_states`, at the positions that predict a target only: [M, D]."""
        x_TD, cos, sin = self._open(embeds_BTD, position_ids_BT)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend_packed(
                query,
                key,
                value,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                backend=self.backend,
            )

        def tail_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend_tail(
                query,
                key,
                value,
                tail=tail,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                backend=self.backend,
            )

        x_TD = self(x_TD, cos, sin, attention=attention, num_layers=len(self.layers) - 1)
        hidden_UD = run_tail(
            self.tail, x_TD, tail.index_U, cos, sin, attention=tail_attention, ops=self.ops
        )
        out: Tensor = self.norm(hidden_UD.index_select(0, tail.target_index_M))
        return out

    def _open(self, embeds_BTD: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = self.rotary(embeds_BTD, position_ids_BT)
        # squeeze, not [0]: the backward pass of an index writes zeros and copies the whole row.
        return embeds_BTD.squeeze(0), cos.squeeze(0), sin.squeeze(0)

    def __call__(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        attention: Attention,
        num_layers: int | None = None,
    ) -> Tensor:
        """Runs (the first) layers over a packed row [T, D]; the final norm is the caller's."""
        for index, layer in enumerate(self.layers[:num_layers]):
            recompute = index < self.num_recomputed and torch.is_grad_enabled()
            x_TD = run_layer(
                layer, x_TD, cos, sin, attention=attention, ops=self.ops, recompute=recompute
            )
        return x_TD


def select_ops(device: torch.device) -> ModuleType:
    """Returns the Triton kernels where they run, the torch ones elsewhere."""
    if device.type != "cuda":
        return torch_ops
    from vistune.models.fused import triton_ops

    return triton_ops


def fuse(decoder: nn.Module, *, device: torch.device, fp8: bool = False) -> FusedTrunk:
    """Builds the fused path over a decoder's layers.

    Args:
        decoder: A transformers decoder (`LlamaModel`, ...), adapters already in place.
        device: Where it runs.
        fp8: Hold the frozen weights in FP8; the decoder's own linear modules then read them too,
            without a backward pass.

    Raises:
        NotFusable: A layer is of an unknown class, trains base weights, or has adapters with
            dropout or DoRA; nothing has been changed then.
    """
    ops = select_ops(device)
    modules = list(decoder.layers)  # type: ignore[arg-type]
    _check_attention(decoder.config)
    for module in modules:
        _check(module)
    layers = [_fuse_layer(module, decoder.config) for module in modules]
    width = layers[-1].head_width
    if fp8:
        for module, layer in zip(modules, layers, strict=True):
            _to_fp8(module, layer, ops)
    tail = TailLayer(layers[-1], *layers[-1].qkv.split(layers[-1].num_heads * width))
    return FusedTrunk(layers, tail, decoder.rotary_emb, decoder.norm, ops)  # type: ignore[arg-type]


def _to_fp8(module: Any, layer: FusedLayer, ops: ModuleType) -> None:
    """Turns a layer's frozen weights into FP8; the layer's own linear modules then read them."""
    a, m = module.self_attn, module.mlp
    places = {
        layer.qkv: [(a, "q_proj"), (a, "k_proj"), (a, "v_proj")],
        layer.out: [(a, "o_proj")],
        layer.gate_up: [(m, "gate_proj"), (m, "up_proj")],
        layer.down: [(m, "down_proj")],
    }
    for projection, owners in places.items():
        projection.to_fp8(ops)
        at = 0
        for owner, name in owners:
            linear = getattr(owner, name)
            width = _base(linear).out_features
            stand_in = Fp8Linear(projection, at, at + width, ops)
            if linear is _base(linear):
                setattr(owner, name, stand_in)
            else:
                linear.base_layer = stand_in
            at += width


def why_not_fusable(decoder: nn.Module) -> str | None:
    """Returns why a decoder cannot take the fused path, or None when it can; changes nothing."""
    try:
        _check_attention(decoder.config)
        for module in decoder.layers:  # type: ignore[union-attr]
            _check(module)
    except NotFusable as reason:
        return str(reason)
    return None


def _check_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise NotFusable("layers attend through a sliding window")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width & (width - 1):
        raise NotFusable(f"heads are {width} wide, which is no power of two")


def _check(module: Any) -> None:
    name = type(module).__name__
    if name not in _KINDS:
        raise NotFusable(f"layers of class {name} have no fused form (known: {', '.join(_KINDS)})")
    for path, parameter in module.named_parameters():
        if parameter.requires_grad and ".lora_" not in path:
            raise NotFusable(f"base weights train ({path})")
    for linear in _linears(module):
        if type(_base(linear)) is not nn.Linear:
            raise NotFusable(f"weights are held as {type(_base(linear)).__name__}")
        if linear is _base(linear):
            continue
        if any(dropout.p > 0 for dropout in _dropouts(linear)):
            raise NotFusable("adapters have dropout")
        if any(linear.use_dora.values()) or len(linear.active_adapters) != 1 or linear.merged:
            raise NotFusable("adapters are merged, several, or DoRA")


def _linears(module: Any) -> tuple[Any, ...]:
    a, m = module.self_attn, module.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj


def _base(linear: Any) -> nn.Linear:
    base: nn.Linear = linear if isinstance(linear, nn.Linear) else linear.base_layer
    return base


def _dropouts(linear: Any) -> list[nn.Dropout]:
    return [d for d in linear.lora_dropout.values() if isinstance(d, nn.Dropout)]


def _project(*linears: Any) -> Projection:
    """Merges projections that read the same input; each keeps its parameter, as a view."""
    bases = [_base(linear) for linear in linears]
    if len(bases) == 1:
        weight: Tensor = bases[0].weight.data
        bias: Tensor | None = bases[0].bias
    else:
        weight = torch.cat([base.weight.data for base in bases])
        at = 0
        for base in bases:
            base.weight.data = weight[at : at + base.out_features]
            at += base.out_features
        biases = [base.bias for base in bases]
        bias = None if biases[0] is None else torch.cat([b.data for b in biases])
    adapters, at = [], 0
    for linear, base in zip(linears, bases, strict=True):
        if linear is not base:
            name = linear.active_adapters[0]
            adapters.append(
                Adapter(
                    down_RI=linear.lora_A[name].weight,
                    up_OR=linear.lora_B[name].weight,
                    scale=linear.scaling[name],
                    start=at,
                    stop=at + base.out_features,
                )
            )
        at += base.out_features
    return Projection(weight, None if bias is None else bias.data, tuple(adapters))


def _fuse_layer(module: Any, config: Any) -> FusedLayer:
    kind = _KINDS[type(module).__name__]
    attention, mlp = module.self_attn, module.mlp
    hidden_act = getattr(config, "hidden_activation", None) or config.hidden_act
    if hidden_act not in _ACTIVATIONS:
        raise NotFusable(f"activation {hidden_act} has no fused form")
    width = attention.head_dim
    return FusedLayer(
        qkv=_project(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_project(attention.o_proj),
        gate_up=_project(mlp.gate_proj, mlp.up_proj),
        down=_project(mlp.down_proj),
        norm1_D=module.input_layernorm.weight.data,
        norm2_D=module.post_attention_layernorm.weight.data,
        eps=getattr(module.input_layernorm, kind.norm_eps),
        unit_offset=kind.unit_offset,
        activation=_ACTIVATIONS[hidden_act],
        num_heads=_base(attention.q_proj).out_features // width,
        num_kv_heads=_base(attention.k_proj).out_features // width,
        head_width=width,
    )
