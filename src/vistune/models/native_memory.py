"""Memory of a training step of transformers' own vision-language models, without their weights.

The model is built of tensors without storage, tuned as the recipe says, and passes of it are
followed (`models.native_passes`) with few layers and over few images; what a row needs follows from
the differences. Bytes are those of tensors, as in `models.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from vistune.models.native_passes import MadeImage, head_pass, stand_in_kernels
from vistune.models.native_weights import (
    PassingBytes,
    head_passing,
    layer_passing,
    role_bytes,
)
from vistune.models.offload import IN_FLIGHT
from vistune.models.recompute import decoder_layers, set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import TrainConfig, TuneConfig
from vistune.recipe.sizes import LOGITS_PER_CHUNK, visiting_optimizer_bytes
from vistune.types import RoleName

_TARGETS = (256, 512)


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
        here = min(again, IN_FLIGHT + 1) if self.moves_inputs else again
        tokens, plain = row.num_tokens, self.num_layers - again
        images = self.patch.times(row.num_patches) + self.patch_pair.times(row.num_patches**2)
        outside = self.row.times(tokens)
        layer = self.layer.times(tokens) + self.pair.times(row.num_pairs)
        recomputed = self.again.times(tokens) + self.pair_again.times(row.num_pairs)
        inputs = here * recomputed.kept
        kept = plain * layer.kept + outside.kept + inputs
        chunk = min(row.num_targets, self.chunk_targets)
        logits = chunk * self.target + row.num_targets * self.target_kept
        # The last layer is a plain one unless all are computed again.
        last = layer if plain else recomputed

        def total(kind: str) -> int:
            return sum(getattr(b, kind) for b in self.roles.values())

        gradients, casts = total("gradients"), total("casts")
        several = gradients if row.num_rows > 1 else 0
        # Casts go with what they are kept for: of layers computed again when the forward pass has
        # ended, the head's when its backward pass has.
        casts_left = casts - again * self.of_layer.casts
        casts_last = casts_left - self.of_head.casts
        early = casts - self.num_layers * self.of_layer.casts - self.of_head.casts
        plain_gradients = self.of_head.gradients + plain * self.of_layer.gradients
        below = images.kept + outside.kept
        first = recomputed.backward if again else layer.kept + layer.backward
        phases = {
            "layers": casts + several + images.kept + kept + last.forward,
            "loss": casts + several + images.kept + kept + logits,
            "head": casts_left + (several or self.of_head.gradients) + self.of_head.at_work
            + images.kept + kept + row.num_targets * self.target_kept,
            "last layer": casts_last + (several or self.of_head.gradients + self.of_layer.gradients)
            + self.of_layer.at_work + images.kept + kept + last.backward,
            "recomputed layer": (early + self.of_layer.casts + (several or plain_gradients)
            + self.of_layer.at_work + below + inputs + recomputed.backward) if again else 0.0,
            "first layer": early + self.of_layer.casts + gradients + self.of_layer.at_work + below
            + first,
            "images": early + several + images.forward + outside.forward,
            "tower": early + gradients + images.backward + outside.backward,
            "update": float(gradients + self.visiting),
        }  # fmt: skip
        where = max(phases, key=lambda name: phases[name])
        passing = {
            "layers": last.forward,
            "last layer": last.backward,
            "recomputed layer": recomputed.backward,
            "first layer": first,
            "images": images.forward - images.kept,
            "tower": images.backward - images.kept,
        }
        held = total("weights") + total("optimizer") + WORKSPACE_BYTES
        return Prediction(
            roles=self.roles,
            tower=int(images.kept),
            activations=int(kept),
            logits=int(logits),
            passing=int(passing.get(where, 0.0)),
            gradients_at_peak=bool(several) or where in ("update", "first layer", "tower"),
            peak=int(held + phases[where]),
            phase=where,
        )


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
    _refuse(facts.whole_config)
    with torch.device("meta"):
        model = native_skeleton(facts).to(dtype)
        apply_tuning(model, tune, seed=0)
    set_training_mode(model, tune, model.module_map)
    if kind != "cpu":
        stand_in_kernels(model, repeats=_repeats(model, train, dtype=dtype, kind=kind))
    if train.checkpoint_tower_layers:
        set_checkpoint_layers(model, train.checkpoint_tower_layers, role="vision")
        let_layers_recompute(model)
    work = work_of(model, tune)
    layers = decoder_layers(model)
    roles = role_bytes(model, tune=tune, train=train, dtype=dtype)
    image = MadeImage.of(model)
    row, patch, patch_pair = outside_amounts(model, image, dtype=dtype)
    layer, pair = layer_amounts(model, image, tune=tune, dtype=dtype)
    patch = replace(patch, kept=patch.kept + added_bytes(model, image, layer, dtype=dtype))
    set_checkpoint_layers(model, len(layers))
    let_layers_recompute(model)
    again, pair_again = layer_amounts(model, image, tune=tune, dtype=dtype)
    stream = torch.float32 if tune.language.mode == "full" else dtype
    few, many = (head_pass(model, num_targets=n, stream=stream, dtype=dtype) for n in _TARGETS)
    both = many - few
    width = int(model.config.get_text_config().hidden_size)
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
        target=max(both.forward, both.backward) / (_TARGETS[1] - _TARGETS[0]),
        target_kept=2 * width * stream.itemsize,
        chunk_targets=max(1, LOGITS_PER_CHUNK // vocabulary),
        of_layer=layer_passing(model, tune=tune, dtype=dtype),
        of_head=head_passing(model, dtype=dtype),
        vocabulary_size=vocabulary,
        work=work,
        image=image,
        patches_per_token=max(
            image.num_patches / image.num_tokens, _most_patches(facts.layout or {})
        ),
        visiting=visiting_optimizer_bytes(sum(trained), train),
        moves_inputs=train.offload.activations,
    )


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


def _refuse(config: Any) -> None:
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
