"""A decoder whose layers run fused, over one packed row.

The decoder keeps its parameters; merged weights are the storage its own projections point into, so
generation, adapters and checkpoints see nothing new. Which decoders have a fused form, and how it
is read off their modules, is `match`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vistune.device import has_triton
from vistune.models.attention import AUTO, Backend, attend_packed, attend_tail
from vistune.models.fused import torch_ops
from vistune.models.fused.calibrate import InputChannels, channels_of
from vistune.models.fused.fp8 import Fp8Linear, num_rounded
from vistune.models.fused.layer import Attention, FusedLayer, run_layer
from vistune.models.fused.match import NotFusable, fused_layer, refuse, why_not_fusable
from vistune.models.fused.projection import Projection, base_of
from vistune.models.fused.tail import TailLayer, run_tail
from vistune.models.offload import InputStore
from vistune.types import Tail

__all__ = ["FusedTrunk", "NotFusable", "fuse", "select_ops", "why_not_fusable"]

_AttentionOf: TypeAlias = Callable[[FusedLayer], Attention]


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
        store: Where the inputs of layers computed again wait; on the device when None.
    """

    layers: list[FusedLayer]
    tail: TailLayer
    rotary: nn.Module
    norm: nn.Module
    ops: ModuleType
    num_recomputed: int = 0
    backend: Backend = AUTO
    store: InputStore | None = None

    def hidden_states(
        self, embeds_BTD: Tensor, position_ids_BT: Tensor, *, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Runs all layers and the final norm over one packed row [1, T, D]."""
        x_TD, cos, sin = self._open(embeds_BTD, position_ids_BT)
        attention_of = self._attention_of(cu_seqlens, max_seqlen)
        out: Tensor = self.norm(self._run(x_TD, cos, sin, attention_of)[None])
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
        attention_of = self._attention_of(cu_seqlens, max_seqlen)
        scoring = self.tail.layer.scoring
        tail_attention = partial(
            attend_tail, tail=tail, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            window=scoring.window, scale=scoring.scale, softcap=scoring.softcap,
            backend=self.backend,
        )  # fmt: skip
        x_TD = self._run(x_TD, cos, sin, attention_of, num_layers=len(self.layers) - 1)
        hidden_UD = run_tail(
            self.tail, x_TD, tail.index_U, cos, sin, attention=tail_attention, ops=self.ops
        )
        out: Tensor = self.norm(hidden_UD.index_select(0, tail.target_index_M))
        return out

    def _attention_of(self, cu_seqlens: Tensor, max_seqlen: int) -> _AttentionOf:
        def attention_of(layer: FusedLayer) -> Attention:
            return partial(
                attend_packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
                window=layer.scoring.window, scale=layer.scoring.scale,
                softcap=layer.scoring.softcap, backend=self.backend,
            )  # fmt: skip

        return attention_of

    def _open(self, embeds_BTD: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for layer in self.layers:
            for projection in (layer.qkv, layer.out, layer.gate_up, layer.down):
                assert projection.holds_parameters, "moved or loaded anew after it was fused"
        # In fp32 whatever the stream's format: slow turns of large keys are lost in bf16 tables.
        cos, sin = self.rotary(embeds_BTD[..., :1].float(), position_ids_BT)
        kind = embeds_BTD.device.type
        if torch.is_autocast_enabled(kind):
            # A trained embedding table is fp32; the stream between layers has their own format.
            embeds_BTD = embeds_BTD.to(torch.get_autocast_dtype(kind))
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
        """Runs (the first) layers over a packed row [T, D]; the final norm is the caller's.

        Args:
            x_TD: [T, D].
            cos: Rotary table [T, head width].
            sin: Rotary table [T, head width].
            attention: For every layer; it must score as the layers do.
            num_layers: How many of the layers.
        """
        return self._run(x_TD, cos, sin, lambda _: attention, num_layers=num_layers)

    def _run(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_of: _AttentionOf,
        *,
        num_layers: int | None = None,
    ) -> Tensor:
        for index, layer in enumerate(self.layers[:num_layers]):
            recompute = index < self.num_recomputed and torch.is_grad_enabled()
            store = self.store if recompute else None
            with nullcontext() if store is None else store.moving(x_TD):
                x_TD = run_layer(
                    layer, x_TD, cos, sin,
                    attention=attention_of(layer), ops=self.ops, recompute=recompute,
                )  # fmt: skip
        return x_TD


def select_ops(device: torch.device) -> ModuleType:
    """Returns the Triton kernels where they run, the torch ones elsewhere."""
    if not has_triton(device):
        return torch_ops
    from vistune.models.fused import triton_ops

    return triton_ops


def fuse(decoder: nn.Module, *, device: torch.device, fp8: bool = False) -> FusedTrunk:
    """Builds the fused path over a decoder's layers.

    Args:
        decoder: A transformers decoder (`LlamaModel`, ...), adapters already in place.
        device: Where it runs.
        fp8: Hold the frozen weights in FP8, but for the last layers (`num_rounded`); the decoder's
            own linear modules then read them too, without a backward pass.

    Raises:
        NotFusable: See `match`; nothing has been changed then.
    """
    ops = select_ops(device)
    modules = list(decoder.layers)  # type: ignore[arg-type]
    refuse(decoder)
    layers = [fused_layer(module, decoder.config, index) for index, module in enumerate(modules)]
    width = layers[-1].head_width
    if fp8:
        rounded = layers[: num_rounded(len(layers))]
        found = channels_of(rounded, decoder, ops)
        for module, layer, channels in zip(modules, rounded, found, strict=False):
            _to_fp8(module, layer, channels, ops)
    tail = TailLayer(layers[-1], *layers[-1].qkv.split(layers[-1].num_heads * width))
    return FusedTrunk(layers, tail, decoder.rotary_emb, decoder.norm, ops)  # type: ignore[arg-type]


def _to_fp8(module: Any, layer: FusedLayer, channels: InputChannels, ops: ModuleType) -> None:
    """Turns a layer's frozen weights into FP8; the layer's own linear modules then read them."""
    a, m = module.self_attn, module.mlp
    places = {
        "qkv": [(a, "q_proj"), (a, "k_proj"), (a, "v_proj")],
        "out": [(a, "o_proj")],
        "gate_up": [(m, "gate_proj"), (m, "up_proj")],
        "down": [(m, "down_proj")],
    }
    for place, owners in places.items():
        projection: Projection = getattr(layer, place)
        projection.to_fp8(channels[place], ops)
        assert projection.fp8 is not None
        at = 0
        for owner, name in owners:
            linear = getattr(owner, name)
            width = base_of(linear).out_features
            stand_in = Fp8Linear(projection.fp8, projection.bias_O, at, at + width, ops)
            if linear is base_of(linear):
                setattr(owner, name, stand_in)
            else:
                linear.base_layer = stand_in
            at += width
