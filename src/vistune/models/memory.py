"""Memory a training step needs, from configs alone: no weights are read and no device is asked.

The model is built of tensors without storage, tuned as the recipe says, and what autograd keeps is
counted on it; only the fused layers, which keep their own, are counted by their formula. All bytes
are those of tensors (what `max_memory_allocated` reports), not of an allocator's blocks or of a
driver's context.

    peak = weights + optimizer + the largest of
             end of the forward pass   casts + kept activations + logits (+ gradients, several rows)
             last layer backward       casts + kept activations + one layer's gradients (+ ...)
             layer computed again      casts + inputs of such layers + one layer in full
             first layer backward      casts + gradients + one layer in full
             end of the backward pass  gradients

"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.models.anyres import tiles_of
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.facts import ModelFacts
from vistune.models.flops import ModelWork, work_of
from vistune.models.fused.fp8 import num_channels, num_rounded
from vistune.models.fused.trunk import why_not_fusable
from vistune.models.kept import kept_slope, peak_slope
from vistune.models.layer_memory import LayerBytes, counted_bytes, fused_bytes
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.offload import IN_FLIGHT
from vistune.models.probes import PlannedModel, family_skeleton, image_probe
from vistune.models.recompute import decoder_layers, set_checkpoint_layers
from vistune.models.stand_in_liger import stand_in_liger
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
_PROBE_IMAGES = (1, 2)


@dataclass(frozen=True)
class RowSize:
    """What of a step decides its memory.

    Args:
        num_tokens: Tokens of one of its rows.
        num_images: Images of that row.
        num_targets: Target tokens of that row.
        num_tail_tokens: Positions the last layer is computed at, from the first target of each
            sample on.
        num_rows: Rows of the step up to this one; behind another, gradients exist while
            activations do.
        num_patches: Patches of that row's images, for models whose images have any size.
        num_pairs: Squared lengths of its samples with images, summed, for models whose tokens see
            ahead.
    """

    num_tokens: int
    num_images: int
    num_targets: int
    num_tail_tokens: int
    num_rows: int = 1
    num_patches: int = 0
    num_pairs: int = 0


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role that do not depend on the row."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0
    """16-bit copies of trained fp32 weights, made in the forward pass."""


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
        phase: Where in a step it is reached.
    """

    roles: dict[RoleName, RoleBytes]
    tower: int
    activations: int
    logits: int
    passing: int
    gradients_at_peak: bool
    peak: int
    phase: str = ""

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
        inputs = here * self.layer.kept_recomputed
        tokens = row.num_tokens
        kept = tokens * ((inner - again) * self.layer.kept + inputs + self.row)
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
        standing = total("casts") + tower
        always = standing + (gradients if several else 0)
        # A layer computed again makes all that it keeps once more; by then those after it are done.
        once_more = tokens * (inputs + self.layer.kept + self.row)
        phases = {
            "forward": always + kept + logits,
            "backward": always + kept + passing,
            "recompute": always + once_more + passing if again else 0.0,
            "first layer": standing + gradients + passing + tokens * (self.layer.kept + self.row),
            "tower": always + images,
            "update": float(gradients + self.visiting),
        }  # fmt: skip
        where = max(phases, key=lambda name: phases[name])
        return Prediction(
            roles=self.roles,
            tower=int(tower),
            activations=int(kept),
            logits=int(logits),
            passing=int(images if where == "tower" else passing),
            gradients_at_peak=several or where in ("update", "first layer"),
            peak=int(held + phases[where]),
            phase=where,
        )


def memory_model(
    parts: ModelConfig,
    facts: ModelFacts,
    *,
    tune: TuneConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    fused: bool,
    kind: str = "cpu",
) -> MemoryModel:
    """Works out the memory of a model under a recipe.

    Args:
        parts: The parts; only the connector's kind is read.
        facts: Their configs.
        tune: What trains.
        train: Optimizer.
        dtype: Format of frozen weights and of activations.
        fused: Whether the device runs fused layers where the model has them.
        kind: Kind of the device, which says whether liger-kernel is taken where it may be.

    Raises:
        ModelError: The model is of a kind that cannot be planned.
    """
    with torch.device("meta"):
        model = skeleton(parts, facts).to(dtype)
        apply_tuning(model, tune, seed=0)
    fused = fused and not _is_quantised(tune) and _has_fused_form(model)
    layers = decoder_layers(model)
    work = work_of(model, tune)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    roles = _role_bytes(model, layers, tune=tune, train=train, dtype=dtype, fused=fused)
    if fused:
        decoder_bytes = fused_bytes(facts.text_config, layers[0], tune=tune, dtype=dtype)
    else:
        stand_in_liger(model, train, kind=kind)
        decoder_bytes = counted_bytes(model, layers, tune=tune, dtype=dtype)
    image_kept, image_passing = _image_bytes(model, dtype=dtype)
    if train.checkpoint_tower_layers:
        set_checkpoint_layers(model, train.checkpoint_tower_layers, role="vision")
        plain, image_kept = image_kept, _image_kept(model, dtype=dtype)
        # A block computed again makes all that it keeps once more.
        image_passing += (plain - image_kept) / train.checkpoint_tower_layers
    width = _width(model)
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
        vocabulary_size=int(model.config.get_text_config().vocab_size),
        fused=fused,
        work=work,
        visiting=visiting_optimizer_bytes(sum(trained), train),
        moves_inputs=train.offload.activations,
    )


def skeleton(parts: ModelConfig, facts: ModelFacts) -> PlannedModel:
    """Builds a model of the described parts; call it where tensors have no storage.

    Args:
        parts: Its parts.
        facts: What is known of them.

    Raises:
        ModelError: Models of this kind cannot be planned.
    """
    if facts.tower is None:
        return family_skeleton(facts.whole_config)
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


def _has_fused_form(model: PlannedModel) -> bool:
    if not isinstance(model, ComposedVLM | MGMForConditionalGeneration):
        return False
    return why_not_fusable(_compat.decoder_of(model.language_model)) is None


def _is_quantised(tune: TuneConfig) -> bool:
    return tune.language.mode != "full" and tune.language.frozen_format in ("int8", "nf4")


def _role_bytes(
    model: PlannedModel,
    layers: Sequence[nn.Module],
    *,
    tune: TuneConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    fused: bool,
) -> dict[RoleName, RoleBytes]:
    """Adds up parameters by role, each counted as it will be held."""
    frozen_format = tune.held_format("language")
    rounded = layers[: num_rounded(len(layers))] if frozen_format == "fp8" else layers
    compact = {id(w): frozen_format for layer in rounded for w in _frozen_linear(layer)}
    # As `models.tune.quantize` rounds them: by role, whatever the tower is built of.
    for name, module in model.named_modules():
        if type(module) is nn.Linear and model.module_map.role_of(name) == "vision":
            compact |= {id(w): tune.held_format("vision") for w in _frozen_linear(module)}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    # A table is looked up in its own format, unless the head multiplies by it.
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    found = {role: RoleBytes() for role in ROLES}
    for name, parameter in model.named_parameters():
        role = model.module_map.role_of(name)
        before, count = found[role], parameter.numel()
        if not parameter.requires_grad:
            held = frozen_bytes(parameter, compact.get(id(parameter), "same"))
            found[role] = replace(before, weights=before.weights + held)
            continue
        is_cast = dtype is not torch.float32 and parameter.dim() > 1 and id(parameter) not in tables
        # The fused layers cast trained weights and adapters on the way and keep none of it.
        is_cast = is_cast and not (fused and id(parameter) in inside)
        cast = count * dtype.itemsize if is_cast else 0
        found[role] = RoleBytes(
            before.weights + 4 * count,
            before.gradients + 4 * count,
            before.optimizer + resident_optimizer_bytes(count, train),
            before.casts + cast,
        )
    if fused and tune.language.mode == "full":
        # The gradients of the last layer exist while all activations still do, and beside them
        # one projection's weights in the format of the arithmetic.
        linear = [m.weight.numel() for m in layers[-1].modules() if isinstance(m, nn.Linear)]
        passing = 4 * sum(p.numel() for p in layers[-1].parameters())
        passing += 2 * max(linear) * dtype.itemsize if dtype is not torch.float32 else 0
        language = found["language"]
        found["language"] = replace(language, casts=language.casts + passing)
    return found


def _frozen_linear(module: nn.Module) -> list[Tensor]:
    return [
        m.weight
        for m in module.modules()
        if isinstance(m, nn.Linear) and not m.weight.requires_grad
    ]


def frozen_bytes(weight: Tensor, frozen_format: Literal["same", "fp8", "int8", "nf4"]) -> int:
    """Returns the bytes a frozen linear layer's weight [out, in] takes in a format."""
    count, rows = weight.numel(), weight.shape[0]
    if frozen_format == "fp8":
        # Both layouts, the columns held twice, a scale per output.
        return 2 * count + rows * (2 * num_channels(weight.shape[1]) + 4)
    if frozen_format == "int8":
        return count + 4 * rows
    if frozen_format == "nf4":
        # Half a byte each; a scale byte per 64, whose own scale is 4 bytes per 256 of them.
        return count // 2 + count // 64 + 4 * -(-count // (64 * 256))
    return count * weight.element_size()


def _width(model: PlannedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _image_bytes(model: PlannedModel, *, dtype: torch.dtype) -> tuple[float, float]:
    """Returns what one image keeps (pixels included) and needs beside it on its way."""
    kept = _image_kept(model, dtype=dtype)
    run = image_probe(model, _image_side(model))
    most = peak_slope(model, run, dtype=dtype, at=_PROBE_IMAGES) + _pixel_bytes(model)
    return kept, max(0.0, most - kept)


def _image_kept(model: PlannedModel, *, dtype: torch.dtype) -> float:
    model.train()
    run = image_probe(model, _image_side(model))
    # The row's pixels; where autograd keeps them as they are they count twice, a thousandth.
    return _pixel_bytes(model) + kept_slope(model, run, dtype=dtype, at=_PROBE_IMAGES)


def _image_side(model: PlannedModel) -> int:
    grid = model.grid
    return grid.fixed_size_px or grid.patch_px * grid.downsample * 16


def _pixel_bytes(model: PlannedModel) -> int:
    return 4 * 3 * _image_side(model) ** 2
