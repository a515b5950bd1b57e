"""Memory a training step needs, from configs alone: no weights are read and no device is asked.

The model is built of tensors without storage, tuned as the recipe says, and what autograd keeps is
counted on it; only the fused layers, which keep their own, are counted by their formula. All bytes
are those of tensors (what `max_memory_allocated` reports), not of an allocator's blocks or of a
driver's context.

    peak = weights + optimizer + the largest of
             end of the forward pass   casts + kept activations + logits (+ gradients, several rows)
             last layer backward       casts + kept activations + one layer's gradients (+ ...)
             layer computed again      casts + inputs of such layers + one layer in full
             end of the backward pass  gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.anyres import tiles_of
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.facts import ModelFacts
from vistune.models.flops import ModelWork, work_of
from vistune.models.fused.trunk import why_not_fusable
from vistune.models.kept import kept_slope
from vistune.models.offload import IN_FLIGHT
from vistune.models.recompute import decoder_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import ModelConfig, TrainConfig, TuneConfig
from vistune.recipe.sizes import (
    LOGITS_PER_CHUNK,
    resident_optimizer_bytes,
    visiting_optimizer_bytes,
)
from vistune.types import ROLES, RoleName

WORKSPACE_BYTES = 96 * 2**20
"""Scratch memory of matrix libraries, held in the same pool."""
_LOGIT_BYTES = 12  # log-probabilities, their gradient and the logits' gradient, fp32 each
_PROBE_TOKENS = (64, 128)
_PROBE = "vistune_probe"


@dataclass(frozen=True)
class RowSize:
    """What of a step decides its memory.

    Args:
        num_tokens: Tokens of its longest row.
        num_images: Images of that row.
        num_targets: Target tokens of that row.
        num_tail_tokens: Positions the last layer is computed at, from the first target of each
            sample on.
        num_rows: Rows of the step; with several, gradients exist while activations do.
    """

    num_tokens: int
    num_images: int
    num_targets: int
    num_tail_tokens: int
    num_rows: int = 1


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role that do not depend on the row."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0
    """16-bit copies of trained fp32 weights, made in the forward pass."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer for each token of a row.

    Args:
        kept: Kept for the backward pass.
        kept_recomputed: Kept when the layer is computed again.
        backward: Made while its backward pass runs.
    """

    kept: float
    kept_recomputed: float
    backward: float


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes at the peak.

    Args:
        roles: Fixed bytes by role.
        tower: Pixels, and what tower and connector keep.
        activations: What the decoder keeps.
        logits: Logits, their probabilities and gradients.
        passing: What exists only while a layer's backward pass (or the tower) runs.
        gradients_at_peak: Whether gradients exist at the peak.
        peak: The largest sum.
    """

    roles: dict[RoleName, RoleBytes]
    tower: int
    activations: int
    logits: int
    passing: int
    gradients_at_peak: bool
    peak: int

    @property
    def peak_gib(self) -> float:
        """The peak in GiB."""
        return self.peak / 2**30


@dataclass(frozen=True)
class MemoryModel:
    """A model's memory as a function of a row's size.

    Args:
        roles: Fixed bytes by role.
        num_layers: Decoder layers.
        layer: Bytes of a layer.
        tail_kept: Bytes the last layer keeps for each token of the row.
        tail_kept_target: And for each position it is computed at.
        row: Bytes for each token outside of layers (ids, rotary tables, embeddings).
        image_kept: What pixels, tower and connector keep for each image.
        image_passing: What the tower makes for each image on its way.
        hidden_target: Bytes for each target between last layer and logits.
        vocabulary_size: Width of the logits.
        fused: Whether the decoder's layers run fused.
        work: Operations, for estimates of time.
        visiting: Bytes of offloaded optimizer state that are on the device during an update.
        moves_inputs: Whether inputs of layers computed again wait on the host.
    """

    roles: dict[RoleName, RoleBytes]
    num_layers: int
    layer: LayerBytes
    tail_kept: float
    tail_kept_target: float
    row: float
    image_kept: float
    image_passing: float
    hidden_target: float
    vocabulary_size: int
    fused: bool
    work: ModelWork | None
    visiting: int = 0
    moves_inputs: bool = False

    def predict(self, row: RowSize, *, checkpoint_layers: int = 0) -> Prediction:
        """Returns the peak of a step.

        Args:
            row: Size of the step's longest row.
            checkpoint_layers: Layers whose activations are computed again.
        """
        inner = self.num_layers - 1
        again = min(checkpoint_layers, inner)
        # Inputs on their way out or back, and the one in use.
        here = min(again, IN_FLIGHT + 1) if self.moves_inputs else again
        tokens = row.num_tokens
        kept = tokens * (
            (inner - again) * self.layer.kept + here * self.layer.kept_recomputed + self.row
        )
        kept += tokens * self.tail_kept + row.num_tail_tokens * self.tail_kept_target
        tower = row.num_images * self.image_kept
        logits = min(row.num_targets * self.vocabulary_size, LOGITS_PER_CHUNK) * _LOGIT_BYTES
        logits += int(row.num_targets * self.hidden_target)
        passing = tokens * self.layer.backward
        images = row.num_images * self.image_passing

        def total(kind: str) -> int:
            return sum(getattr(b, kind) for b in self.roles.values())

        held = total("weights") + total("optimizer") + WORKSPACE_BYTES
        several = row.num_rows > 1
        gradients = total("gradients")
        always = total("casts") + tower + (gradients if several else 0)
        # A layer computed again makes all that it keeps once more; by then those after it are done.
        once_more = tokens * (here * self.layer.kept_recomputed + self.layer.kept + self.row)
        phases = {
            "forward": always + kept + logits,
            "backward": always + kept + passing,
            "recompute": (always + once_more + passing) if again else 0.0,
            "tower": always + images,
            "update": float(gradients + self.visiting),
        }
        where = max(phases, key=lambda name: phases[name])
        return Prediction(
            roles=self.roles,
            tower=int(tower),
            activations=int(kept),
            logits=int(logits),
            passing=int(images if where == "tower" else passing),
            gradients_at_peak=several or where == "update",
            peak=int(held + phases[where]),
        )


def memory_model(
    parts: ModelConfig,
    facts: ModelFacts,
    *,
    tune: TuneConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    fused: bool,
) -> MemoryModel:
    """Works out the memory of a model under a recipe.

    Args:
        parts: The parts; only the connector's kind is read.
        facts: Their configs.
        tune: What trains.
        train: Optimizer.
        dtype: Format of frozen weights and of activations.
        fused: Whether the device runs fused layers where the model has them.

    Raises:
        ModelError: The model is of a kind that cannot be planned.
    """
    with torch.device("meta"):
        model = skeleton(parts, facts).to(dtype)
        apply_tuning(model, tune, seed=0)
    decoder = _compat.decoder_of(model.language_model)
    fused = fused and not _is_quantised(tune) and why_not_fusable(decoder) is None
    layers = decoder_layers(model)
    work = work_of(model, tune)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    roles = _role_bytes(model, layers, tune=tune, train=train, dtype=dtype)
    if fused:
        decoder_bytes = _fused_bytes(facts.text_config, layers[0], tune=tune, dtype=dtype)
    else:
        decoder_bytes = _counted_bytes(model, layers, tune=tune, dtype=dtype)
    image_kept, image_passing = _image_bytes(model, dtype=dtype)
    width = int(facts.text_config.hidden_size)
    head = model.get_output_embeddings()
    return MemoryModel(
        roles=roles,
        num_layers=len(layers),
        layer=decoder_bytes.layer,
        tail_kept=decoder_bytes.tail_kept,
        tail_kept_target=decoder_bytes.tail_kept_target,
        row=decoder_bytes.row,
        image_kept=image_kept,
        image_passing=image_passing,
        hidden_target=width * (dtype.itemsize * 2 + 4 + 4),
        vocabulary_size=int(head.weight.shape[0]),
        fused=fused,
        work=work,
        visiting=visiting_optimizer_bytes(sum(trained), train),
        moves_inputs=train.offload.activations,
    )


def skeleton(parts: ModelConfig, facts: ModelFacts) -> ComposedVLM:
    """Builds a composed model of the described parts; call it where tensors have no storage."""
    if facts.tower is None or facts.text_config is None:
        raise ModelError(
            "only models made of tower, connector and language model can be planned",
            where="model",
            fix="set batch.max_tokens and train.checkpoint_layers to numbers",
        )
    config = ComposedConfig.compose(
        vision_config=facts.vision_config,
        text_config=facts.text_config,
        tower=facts.tower,
        connector_kind=parts.connector.kind,
        pixel_shuffle=parts.connector.pixel_shuffle,
        image_token_id=facts.image_token_id,
        image_embed_scale=1.0,
        tiles=tiles_of(facts),
    )
    return ComposedVLM(config)


def _is_quantised(tune: TuneConfig) -> bool:
    return tune.language.mode != "full" and tune.language.frozen_format in ("int8", "nf4")


def _role_bytes(
    model: ComposedVLM,
    layers: Sequence[nn.Module],
    *,
    tune: TuneConfig,
    train: TrainConfig,
    dtype: torch.dtype,
) -> dict[RoleName, RoleBytes]:
    """Adds up parameters by role, each counted as it will be held."""
    compact = {
        id(m.weight): m.weight
        for layer in layers
        for m in layer.modules()
        if isinstance(m, nn.Linear) and not m.weight.requires_grad
    }
    frozen_format = "same" if tune.language.mode == "full" else tune.language.frozen_format
    found = {role: RoleBytes() for role in ROLES}
    for name, parameter in model.named_parameters():
        role = model.module_map.role_of(name)
        before, count = found[role], parameter.numel()
        if not parameter.requires_grad:
            held = count * parameter.element_size()
            if id(parameter) in compact:
                held = frozen_bytes(parameter, frozen_format)
            found[role] = replace(before, weights=before.weights + held)
            continue
        cast = count * dtype.itemsize if dtype is not torch.float32 and parameter.dim() > 1 else 0
        # The fused layers cast adapters on the way and keep none of it.
        cast = 0 if ".lora_" in name and role == "language" else cast
        found[role] = RoleBytes(
            before.weights + 4 * count,
            before.gradients + 4 * count,
            before.optimizer + resident_optimizer_bytes(count, train),
            before.casts + cast,
        )
    if frozen_format == "fp8":
        # The last layer's query and key-value projections stand apart: their transposed layout is
        # a copy.
        again = sum(w.numel() for w in _query_key_value(layers[-1]))
        language = found["language"]
        found["language"] = replace(language, weights=language.weights + again)
    return found


def _query_key_value(layer: nn.Module) -> list[Tensor]:
    return [
        m.weight
        for name, m in layer.named_modules()
        if isinstance(m, nn.Linear)
        and ".lora_" not in name
        and not {"q_proj", "k_proj", "v_proj"}.isdisjoint(name.split("."))
    ]


def frozen_bytes(weight: Tensor, frozen_format: Literal["same", "fp8", "int8", "nf4"]) -> int:
    """Returns the bytes a frozen linear layer's weight [out, in] takes in a format."""
    count, rows = weight.numel(), weight.shape[0]
    if frozen_format == "fp8":
        return 2 * count + 4 * rows  # both layouts, a scale per output
    if frozen_format == "int8":
        return count + 4 * rows
    if frozen_format == "nf4":
        # Half a byte each; a scale byte per 64, whose own scale is 4 bytes per 256 of them.
        return count // 2 + count // 64 + 4 * -(-count // (64 * 256))
    return count * weight.element_size()


@dataclass(frozen=True)
class _Decoder:
    layer: LayerBytes
    tail_kept: float
    tail_kept_target: float
    row: float


def _fused_bytes(
    config: Any, layer: nn.Module, *, tune: TuneConfig, dtype: torch.dtype
) -> _Decoder:
    """What `models.fused` keeps; names as in its `_Saved`."""
    b = dtype.itemsize
    width, inner = int(config.hidden_size), int(config.intermediate_size)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    head_width = int(getattr(config, "head_dim", None) or width // heads)
    query, key_value = heads * head_width, 2 * kv_heads * head_width
    ranks = sum(
        int(part.weight.shape[0])
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear) and ".lora_A" in name
    )
    rstd, lse = 4, 4 * heads
    repeated = _repeated_bytes(config, dtype=dtype)
    mlp = b * (width + 2 * inner) + rstd  # h, gate_up
    # x, q k v, attended; and key heads once for each query head where the kernel wants them so
    kept = b * (width + 2 * query + key_value + ranks) + repeated + rstd + lse + mlp
    fp8 = tune.language.mode != "full" and tune.language.frozen_format == "fp8"
    # Backward through the MLP: gradient of the output, of the active inner values, and where they
    # are wanted, those values again and the FP8 form of the gradient of gate and up.
    through_mlp = b * (width + inner + (inner if ranks else 0)) + (2 * inner if fp8 else 0)
    # Through attention: three gradients of the row's width, those of q, k, v, and the flash
    # kernel's fp32 sums for q.
    through_attention = b * (3 * width + query + key_value) + repeated + 4 * query + 2 * lse
    return _Decoder(
        layer=LayerBytes(kept, b * width, max(through_mlp, through_attention)),
        tail_kept=b * (width + key_value) + repeated + rstd,
        tail_kept_target=b * (width + 2 * query + ranks) + rstd + lse + mlp,
        # ids and positions (8 each), cos and sin, the mask of image tokens and their places
        row=16 + 2 * head_width * b + 9,
    )


def _repeated_bytes(config: Any, *, dtype: torch.dtype) -> int:
    """Bytes for each token of keys and values repeated for every query head, where they are."""
    heads = int(config.num_attention_heads)
    grouped = int(getattr(config, "num_key_value_heads", None) or heads) < heads
    if not grouped or dtype is torch.float32 or not _compat.varlen_repeats_groups():
        return 0
    head_width = int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)
    return 2 * dtype.itemsize * heads * head_width


def _counted_bytes(
    model: ComposedVLM, layers: Sequence[nn.Module], *, tune: TuneConfig, dtype: torch.dtype
) -> _Decoder:
    """Counts what autograd keeps of the decoder as transformers wrote it."""
    config: Any = _compat.decoder_of(model.language_model).config
    width = int(config.hidden_size)
    model.train()
    below = tune.connector.mode == "full" or tune.vision.mode != "freeze"
    stream = torch.float32 if tune.language.mode == "full" else dtype

    # Transformers takes tensors without storage for a trace and would make a T x T mask.
    _compat.register_attention(_PROBE, _causal_attention)
    config._attn_implementation = _PROBE

    def run(num_tokens: int) -> object:
        embeds = torch.zeros(1, num_tokens, width, dtype=stream, requires_grad=below)
        positions = torch.arange(num_tokens)[None]
        return _compat.decoder_of(model.language_model)(
            inputs_embeds=embeds, attention_mask=None, position_ids=positions, use_cache=False
        )

    kept = kept_slope(model, run, dtype=dtype, at=_PROBE_TOKENS) / len(layers)
    kept += _repeated_bytes(config, dtype=dtype)
    inner = int(getattr(config, "intermediate_size", 4 * width))
    wide = stream.itemsize
    backward = dtype.itemsize * 3 * inner + wide * 3 * width
    return _Decoder(
        layer=LayerBytes(kept, wide * width, backward),
        tail_kept=kept,
        tail_kept_target=0.0,
        row=16 + 9 + wide * width,
    )


def _causal_attention(
    module: nn.Module,
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


def _image_bytes(model: ComposedVLM, *, dtype: torch.dtype) -> tuple[float, float]:
    """Returns what one image keeps (pixels included) and makes on its way through a tower."""
    grid = model.grid
    side = grid.fixed_size_px or grid.patch_px * grid.downsample * 16
    pixel_bytes = 4 * 3 * side * side

    def run(num_images: int) -> object:
        return model.image_features(torch.zeros(num_images, 3, side, side))

    kept = kept_slope(model, run, dtype=dtype, at=(1, 2))
    positions = (side // grid.patch_px) ** 2 + 1
    config = model.config.vision_config
    width = int(getattr(config, "hidden_size", 1024))
    inner = int(getattr(config, "intermediate_size", 4 * width))
    passing = positions * dtype.itemsize * (4 * width + 3 * inner)
    return pixel_bytes + kept, passing
