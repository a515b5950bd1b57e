"""Memory of a training step of transformers' own vision-language models, without their weights.

The model is built of tensors without storage, tuned as the recipe says, and passes of it are
followed (`models.native_passes`) with few layers and over few images; what a row needs follows from
the differences. Bytes are those of tensors, as in `models.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vistune import _compat
from vistune.device.attention import AttentionNeeds, AttentionSupport, choose_attention
from vistune.errors import ModelError
from vistune.models.facts import ModelFacts
from vistune.models.flops import ModelWork, work_of
from vistune.models.memory import WORKSPACE_BYTES, Prediction, RoleBytes, RowSize
from vistune.models.modes import let_layers_recompute, set_training_mode
from vistune.models.native import NativeVLM, native_skeleton
from vistune.models.native.describe import family_of
from vistune.models.native_amounts import Amounts, added_bytes, layer_amounts, outside_amounts
from vistune.models.native_passes import MadeImage, head_pass
from vistune.models.native_weights import (
    PassingBytes,
    head_passing,
    layer_passing,
    role_bytes,
)
from vistune.models.offload import IN_FLIGHT
from vistune.models.recompute import decoder_layers, set_checkpoint_layers
from vistune.models.stand_in_liger import stand_in_liger
from vistune.models.stand_ins import stand_in_kernels
from vistune.models.tune import apply_tuning
from vistune.recipe import TrainConfig, TuneConfig
from vistune.recipe.sizes import LOGITS_PER_CHUNK, visiting_optimizer_bytes
from vistune.types import RoleName

_TARGETS = (256, 512)
_WITH_GRADIENTS = frozenset({"first layer", "embeddings", "tower", "update"})


@dataclass(frozen=True)
class NativeMemory:
    """A model's memory as a function of a row's size.

    Args:
        roles: Bytes by role that do not depend on the row.
        num_layers: Layers of the decoder.
        layer: What a layer keeps for each token, and what passes need beyond all that is kept.
        again: The same of a layer that is computed again.
        row: For each token outside of the layers, all that is kept included.
        patch: For each patch of the row's images, from pixels to embeddings, likewise.
        patch_pair: For each pair of patches of the row (a mask over all of its images).
        pair: For each pair of tokens of a sample, of a layer (a mask that sees ahead).
        pair_again: The same of a layer that is computed again.
        target: For each target of which logits are held at once.
        target_kept: For each target.
        chunk_targets: Targets of which logits are held at once.
        of_layer: Made of one layer's weights.
        of_head: Made of the output head's weights.
        table: Bytes of the gradients of the embedding table, where it trains.
        tied: Whether that table is the head too.
        vocabulary_size: Width of the logits.
        work: Operations, for estimates of time.
        image: The image that was looked at.
        patches_per_token: Most patches that stand behind an image token.
        visiting: Bytes of offloaded optimizer state on the device during an update.
        moves_inputs: Whether inputs of layers computed again wait on the host.
        fused: Never.
    """

    roles: dict[RoleName, RoleBytes]
    num_layers: int
    layer: Amounts
    again: Amounts
    row: Amounts
    patch: Amounts
    patch_pair: Amounts
    pair: Amounts
    pair_again: Amounts
    target: float
    target_kept: float
    chunk_targets: int
    of_layer: PassingBytes
    of_head: PassingBytes
    table: int
    tied: bool
    vocabulary_size: int
    work: ModelWork | None
    image: MadeImage
    patches_per_token: float
    visiting: int = 0
    moves_inputs: bool = False
    fused: bool = False

    def predict(self, row: RowSize, *, checkpoint_layers: int = 0) -> Prediction:
        """Returns the peak of a step.

        Args:
            row: Size of the step's longest row.
            checkpoint_layers: Layers whose activations are computed again.
        """
        again = min(checkpoint_layers, self.num_layers)
        need = self._need(row, again)
        moments = self._moments(row, again, need)
        where = max(moments, key=lambda name: moments[name])
        passing = {
            "layers": need.last.forward,
            "last layer": need.last.backward,
            "recomputed layer": need.recomputed.backward,
            "first layer": need.first,
            "images": need.images.forward - need.images.kept,
            "tower": need.images.backward - need.images.kept,
        }
        held = self._total("weights") + self._total("optimizer") + WORKSPACE_BYTES
        return Prediction(
            roles=self.roles,
            tower=int(need.images.kept),
            activations=int(need.kept),
            logits=int(need.logits),
            passing=int(passing.get(where, 0.0)),
            gradients_at_peak=row.num_rows > 1 or where in _WITH_GRADIENTS,
            peak=int(held + moments[where]),
            phase=where,
        )

    def _total(self, kind: Literal["weights", "gradients", "optimizer", "casts"]) -> int:
        return sum(getattr(of_role, kind) for of_role in self.roles.values())

    def _need(self, row: RowSize, again: int) -> _Need:
        """Returns what the tensors of a row need."""
        here = min(again, IN_FLIGHT + 1) if self.moves_inputs else again
        outside = self.row.times(row.num_tokens)
        plain = self.layer.times(row.num_tokens) + self.pair.times(row.num_pairs)
        recomputed = self.again.times(row.num_tokens) + self.pair_again.times(row.num_pairs)
        inputs = here * recomputed.kept
        chunk = min(row.num_targets, self.chunk_targets)
        of_squares = self.patch_pair.times(row.num_patches**2)
        return _Need(
            images=self.patch.times(row.num_patches) + of_squares,
            outside=outside,
            recomputed=recomputed,
            # The last layer is a plain one unless all are computed again.
            last=recomputed if again == self.num_layers else plain,
            first=recomputed.backward if again else plain.kept + plain.backward,
            inputs=inputs,
            kept=(self.num_layers - again) * plain.kept + outside.kept + inputs,
            logits=chunk * self.target + row.num_targets * self.target_kept,
        )

    def _moments(self, row: RowSize, again: int, need: _Need) -> dict[str, float]:
        """Returns the bytes beside weights and optimizer at the moments that may be the peak."""
        layer, head = self.of_layer, self.of_head
        gradients, casts = self._total("gradients"), self._total("casts")
        plain = self.num_layers - again
        if row.num_rows > 1:  # a gradient comes beside the sum of those of the rows before
            before = with_head = with_layer = with_plain = with_layers = gradients
            with_head += head.gradients
            with_layer += 2 * layer.at_work
            table = self.table
        else:
            before, with_head = 0, head.gradients
            with_layer = head.gradients + layer.gradients
            with_plain = head.gradients + plain * layer.gradients
            with_layers = head.gradients + self.num_layers * layer.gradients
            table = self.table if self.tied else 0
        # Casts go with what they are kept for: of layers computed again when the forward pass has
        # ended, the head's when its backward pass has.
        below = casts - self.num_layers * layer.casts - head.casts
        kept, early = need.images.kept + need.kept, need.images.kept + need.outside.kept
        one = below + layer.casts + layer.at_work + early
        return {
            "layers": casts + before + kept + need.last.forward,
            "loss": casts + before + kept + need.logits,
            "head": below + plain * layer.casts + head.casts + with_head + head.at_work
            + kept + row.num_targets * self.target_kept,
            "last layer": below + plain * layer.casts + with_layer + layer.at_work
            + kept + need.last.backward,
            "recomputed layer": (one + with_plain + need.inputs
            + need.recomputed.backward) if again else 0.0,
            "first layer": one + with_layers + need.first,
            "embeddings": below + early + gradients + table,
            "images": below + before + need.images.forward + need.outside.forward,
            "tower": below + gradients + need.images.backward + need.outside.backward,
            "update": float(gradients + self.visiting),
        }  # fmt: skip


@dataclass(frozen=True)
class _Need:
    """Bytes of the tensors of a row: at several layers, from images, outside, and kept in all."""

    images: Amounts
    outside: Amounts
    recomputed: Amounts
    last: Amounts
    first: float
    inputs: float
    kept: float
    logits: float


def native_memory(
    facts: ModelFacts,
    *,
    tune: TuneConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    kind: str,
) -> NativeMemory:
    """Works out the memory of one of transformers' own models under a recipe.

    Args:
        facts: The model.
        tune: What trains.
        train: Optimizer, attention, recomputed blocks of the tower.
        dtype: Format of frozen weights and of activations.
        kind: Kind of the device.

    Raises:
        ModelError: Its memory cannot be predicted.
    """
    _refuse(facts.whole_config, tune, train)
    model = _tuned(facts, tune, dtype)
    work = work_of(model, tune)
    _set_up(model, tune, train, dtype=dtype, kind=kind)
    layers = decoder_layers(model)
    roles = role_bytes(model, tune=tune, train=train, dtype=dtype)
    image = MadeImage.of(model)
    row, patch, patch_pair = outside_amounts(model, image, dtype=dtype)
    layer, pair = layer_amounts(model, image, tune=tune, dtype=dtype)
    patch = replace(patch, kept=patch.kept + added_bytes(model, image, layer, dtype=dtype))
    set_checkpoint_layers(model, len(layers))
    let_layers_recompute(model)
    again, pair_again = layer_amounts(model, image, tune=tune, dtype=dtype)
    target, target_kept = _target_bytes(model, tune, dtype)
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    vocabulary = int(model.config.get_text_config().vocab_size)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return NativeMemory(
        roles=roles,
        num_layers=len(layers),
        layer=layer,
        again=again,
        row=row,
        patch=patch,
        patch_pair=patch_pair,
        pair=pair,
        pair_again=pair_again,
        target=target,
        target_kept=target_kept,
        chunk_targets=max(1, LOGITS_PER_CHUNK // vocabulary),
        of_layer=layer_passing(model, tune=tune, dtype=dtype),
        of_head=head_passing(model, dtype=dtype),
        table=4 * table.numel() if table.requires_grad else 0,
        tied=model.get_output_embeddings().weight is table,
        vocabulary_size=vocabulary,
        work=work,
        image=image,
        patches_per_token=max(
            image.num_patches / image.num_tokens, _most_patches(facts.layout or {})
        ),
        visiting=visiting_optimizer_bytes(sum(trained), train),
        moves_inputs=train.offload.activations,
    )


def _tuned(facts: ModelFacts, tune: TuneConfig, dtype: torch.dtype) -> NativeVLM:
    with torch.device("meta"):
        model = native_skeleton(facts).to(dtype)
        apply_tuning(model, tune, seed=0)
    return model


def _set_up(
    model: NativeVLM, tune: TuneConfig, train: TrainConfig, *, dtype: torch.dtype, kind: str
) -> None:
    """Sets modes, kernels and the tower's recomputed blocks as a run would."""
    set_training_mode(model, tune, model.module_map)
    if kind != "cpu":
        stand_in_kernels(model, repeats=_repeats(model, train, dtype=dtype, kind=kind))
    stand_in_liger(model, train, kind=kind)
    if train.checkpoint_tower_layers:
        set_checkpoint_layers(model, train.checkpoint_tower_layers, role="vision")
        let_layers_recompute(model)


def _target_bytes(model: NativeVLM, tune: TuneConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Returns what each target needs whose logits are held, and what each target keeps."""
    stream = torch.float32 if tune.language.mode == "full" else dtype
    few, many = (head_pass(model, num_targets=n, stream=stream, dtype=dtype) for n in _TARGETS)
    both, width = many - few, int(model.config.get_text_config().hidden_size)
    # A hidden state and its gradient.
    kept = 2 * width * stream.itemsize
    return max(both.forward, both.backward) / (_TARGETS[1] - _TARGETS[0]), kept


def why_not_predicted(config: Any) -> str | None:
    """Returns why a model's passes depend on more than a row's size, or None.

    Args:
        config: Of the whole model.
    """
    if family_of(config).is_recurrent:
        return "layers that carry a state from token to token"
    if getattr(config.get_text_config(), "num_experts", None):
        return "experts, of which each sees as many tokens as the row happens to send it"
    return None


def _refuse(config: Any, tune: TuneConfig, train: TrainConfig) -> None:
    if train.fused == "on" or tune.held_format("language") == "fp8":
        raise ModelError(
            "transformers' own vision-language models have no fused form",
            where="train.fused" if train.fused == "on" else "tune.language.frozen_format",
            fix="set train.fused=auto and tune.language.frozen_format=same",
        )
    reason = why_not_predicted(config)
    if reason is not None:
        raise ModelError(
            "the memory of a model of this kind cannot be predicted",
            where="model.from_checkpoint",
            got=f"{config.model_type}: {reason}",
            fix="set batch.max_tokens and train.checkpoint_layers to numbers",
        )


def _most_patches(layout: Mapping[str, Any]) -> float:
    """Returns the most patches behind a token where tokens of large images are drawn together."""
    if layout.get("kind") != "onevision":
        return 0.0
    tile, most = layout["tile_px"], layout["max_tiles"]
    tiles = (height * width // tile**2 for height, width in layout["sizes_px"])
    return max(float((1 + number) / (1 + min(number, most))) for number in tiles)


def _repeats(model: NativeVLM, train: TrainConfig, *, dtype: torch.dtype, kind: str) -> bool:
    """Whether key heads are repeated for the kernel that the language model would take."""
    text = model.config.get_text_config()
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    needs = AttentionNeeds(width, dtype)
    present = kind == "cuda" and torch.cuda.is_available()
    support = AttentionSupport.of(torch.device("cuda")) if present else AttentionSupport(kind)
    wanted = train.attention if present else "auto"
    name = choose_attention(wanted, support, needs).name
    return name == "sdpa" or (name == "varlen" and _compat.varlen_repeats_groups())
