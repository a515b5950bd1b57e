"""What differs between vision encoders: where layers and norms are, and how features are laid out.

A plan says which part of an encoder is used. What lies behind the layer taken is neither built nor
computed, so no parameter is left without a gradient. No weights are read here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistune.errors import ModelError
from vistune.models.towers.scales import check_scales, scaled_features
from vistune.models.towers.timm_probe import timm_probe, timm_width
from vistune.registry import nearest
from vistune.types import VisionGrid


@dataclass(frozen=True)
class TowerFamily:
    """One kind of vision encoder.

    Args:
        model_class: Class in transformers; None for a tower of our own.
        class_token: Whether position 0 is a class token.
        num_prefix: Positions before the patches, from the config.
        patch_px: Pixels behind one position, from the config.
        fixed_size: Whether only the configured input side will do.
        layers: "blocks" when the depth can be chosen by `num_hidden_layers`, "stages" when by the
            lists of a staged convolutional net, None when only the whole encoder can be used.
        default_layer: What `layer: auto` means; None is the normalised output.
        final_norm: Module path of the last norm.
        norm_in_features: Whether that norm is applied to the features (and not to a pooled vector).
        never_reached: Parameters that patch features never touch; they stay frozen.
        model_kwargs: Arguments of the model class.
        config_changes: Values set in the config.
        foreign_keys: Prefixes of weights in a checkpoint that belong to other parts of it.
    """

    model_class: str | None
    class_token: bool
    num_prefix: Callable[[Any], int] = lambda config: 0
    patch_px: Callable[[Any], int] = lambda config: int(config.patch_size)
    fixed_size: bool = True
    layers: Literal["blocks", "stages"] | None = "blocks"
    default_layer: int | None = None
    final_norm: str | None = None
    norm_in_features: bool = True
    never_reached: tuple[str, ...] = ()
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    config_changes: tuple[tuple[str, Any], ...] = ()
    foreign_keys: tuple[str, ...] = ()


def _one(config: Any) -> int:
    return 1


def _with_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


def _stage_stride_px(config: Any) -> int:
    return int(getattr(config, "patch_size", 4)) << (len(config.hidden_sizes) - 1)


_TWO_TOWERS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

FAMILIES: dict[str, TowerFamily] = {
    "clip_vision_model": TowerFamily(
        "CLIPVisionModel",
        class_token=True,
        num_prefix=_one,
        default_layer=-2,
        final_norm="post_layernorm",
        norm_in_features=False,
        foreign_keys=_TWO_TOWERS,
    ),
    "siglip_vision_model": TowerFamily(
        "SiglipVisionModel",
        class_token=False,
        final_norm="post_layernorm",
        config_changes=(("vision_use_head", False),),
        foreign_keys=(*_TWO_TOWERS, "head.", "classifier."),
    ),
    "siglip2_vision_model": TowerFamily(
        "Siglip2VisionModel",
        class_token=False,
        fixed_size=False,
        final_norm="post_layernorm",
        config_changes=(("vision_use_head", False),),
        foreign_keys=(*_TWO_TOWERS, "head.", "classifier."),
    ),
    "vit": TowerFamily(
        "ViTModel",
        class_token=True,
        num_prefix=_one,
        final_norm="layernorm",
        model_kwargs=(("add_pooling_layer", False),),
        foreign_keys=("pooler.", "classifier.", "decoder."),
    ),
    "dinov2": TowerFamily(
        "Dinov2Model",
        class_token=True,
        num_prefix=_one,
        fixed_size=False,
        final_norm="layernorm",
        never_reached=("embeddings.mask_token",),
        foreign_keys=("classifier.",),
    ),
    "dinov2_with_registers": TowerFamily(
        "Dinov2WithRegistersModel",
        class_token=True,
        num_prefix=_with_registers,
        fixed_size=False,
        final_norm="layernorm",
        never_reached=("embeddings.mask_token",),
        foreign_keys=("classifier.",),
    ),
    "dinov3_vit": TowerFamily(
        "DINOv3ViTModel",
        class_token=True,
        num_prefix=_with_registers,
        fixed_size=False,
        final_norm="norm",
        never_reached=("embeddings.mask_token",),
        foreign_keys=("classifier.",),
    ),
    "convnext": TowerFamily(
        "ConvNextModel",
        class_token=False,
        patch_px=_stage_stride_px,
        fixed_size=False,
        layers="stages",
        final_norm="layernorm",
        norm_in_features=False,
        foreign_keys=("classifier.",),
    ),
    "convnextv2": TowerFamily(
        "ConvNextV2Model",
        class_token=False,
        patch_px=_stage_stride_px,
        fixed_size=False,
        layers="stages",
        final_norm="layernorm",
        norm_in_features=False,
        foreign_keys=("classifier.",),
    ),
    "dinov3_convnext": TowerFamily(
        "DINOv3ConvNextModel",
        class_token=True,
        num_prefix=_one,
        patch_px=_stage_stride_px,
        fixed_size=False,
        layers=None,
        final_norm="layer_norm",
        foreign_keys=("classifier.",),
    ),
    "efficientnet_lite": TowerFamily(None, class_token=False, fixed_size=False, layers=None),
    "timm_wrapper": TowerFamily(
        "TimmWrapperModel",
        class_token=False,
        layers=None,
        config_changes=(("do_pooling", False),),
        foreign_keys=("timm_model.head.", "timm_model.fc.", "timm_model.classifier."),
    ),
}

# Models of two towers: the vision part stands in their config under this name.
TWO_TOWER_TYPES = ("clip", "siglip", "siglip2")


@dataclass(frozen=True)
class TowerPlan:
    """Which part of an encoder is used.

    Args:
        family: Its entry in `FAMILIES`.
        normalised: Whether the final norm belongs to the features.
        select: `patch`, or `cls_patch` with the class token in front.
        num_prefix: Positions before the patches.
        scales: Sides at which an image is seen (S2), smallest first; empty for its own alone.
    """

    family: str
    normalised: bool
    select: Literal["patch", "cls_patch"]
    num_prefix: int
    scales: tuple[int, ...] = ()

    @property
    def traits(self) -> TowerFamily:
        """The family's entry."""
        return FAMILIES[self.family]


def family_of(config: Any, *, where: str) -> TowerFamily:
    """Returns the family of a vision config.

    Raises:
        ModelError: Vistune knows no tower of that kind.
    """
    model_type = str(config.model_type)
    if model_type not in FAMILIES:
        close = nearest(model_type, list(FAMILIES))
        raise ModelError(
            f"'{model_type}' is not a vision tower that vistune knows"
            + (f"; did you mean a model of type '{close}'?" if close else ""),
            where=where,
            expected=", ".join(sorted(FAMILIES)),
            fix="set model.vision_tower.path to a vision encoder",
        )
    return FAMILIES[model_type]


def plan_tower(
    config: Any,
    *,
    layer: int | str,
    select: Literal["patch", "cls_patch"],
    where: str,
    scales: tuple[int, ...] = (),
) -> tuple[TowerPlan, Any]:
    """Decides which part of an encoder is used.

    Args:
        config: The encoder's own config.
        layer: Index into its hidden states, or `auto`.
        select: Positions kept.
        where: Path, for messages.
        scales: Sides at which an image is seen (S2); see `TowerPlan`.

    Returns:
        The plan, and a copy of the config that builds no more than that part.

    Raises:
        ModelError: The encoder has no such layer, or no class token to keep.
    """
    family = family_of(config, where=where)
    if select == "cls_patch" and not family.class_token:
        raise ModelError(
            f"a '{config.model_type}' tower has no class token to keep",
            where=where,
            fix="set model.vision_tower.select=patch",
        )
    config = copy.deepcopy(config)
    for key, value in family.config_changes:
        setattr(config, key, value)
    wanted = family.default_layer if layer == "auto" else int(layer)
    normalised = wanted is None and family.norm_in_features
    if wanted is not None:
        _cut(config, family, wanted, where=where)
    plan = TowerPlan(
        family=str(config.model_type),
        normalised=normalised,
        select=select,
        num_prefix=_num_prefix(config, family),
        scales=scales,
    )
    return plan, config


def _cut(config: Any, family: TowerFamily, layer: int, *, where: str) -> None:
    """Changes a config so that its output is the hidden state `layer`."""
    if family.layers is None:
        raise ModelError(
            f"a '{config.model_type}' tower offers only its last features",
            where=where,
            got=f"layer={layer}",
            fix="set model.vision_tower.layer=auto",
        )
    stages = family.layers == "stages"
    depth = len(config.depths) if stages else int(config.num_hidden_layers)
    kept = layer if layer >= 0 else depth + 1 + layer
    if not (1 if stages else 0) <= kept <= depth:
        raise ModelError(
            f"this tower has {depth} layers, so {depth + 1} hidden states",
            where=where,
            got=f"layer={layer}",
            expected=f"{-depth if stages else -depth - 1} to {depth}, or auto",
            fix="set model.vision_tower.layer",
        )
    if not stages:
        _set_depth(config, num_hidden_layers=kept)
        return
    _set_depth(
        config,
        depths=list(config.depths)[:kept],
        hidden_sizes=list(config.hidden_sizes)[:kept],
        num_stages=kept,
    )


def _set_depth(config: Any, **changes: Any) -> None:
    for key, value in changes.items():
        setattr(config, key, value)
    # Backbone configs also carry names of their stages, which must agree with the depth.
    if getattr(config, "stage_names", None) is not None:
        depth = changes.get("num_hidden_layers", len(changes.get("depths", ())))
        names = list(config.stage_names)[: depth + 1]
        config.stage_names = names
        for key, value in (("_out_features", [names[-1]]), ("_out_indices", [len(names) - 1])):
            if getattr(config, key, None) is not None:
                setattr(config, key, value)


def _num_prefix(config: Any, family: TowerFamily) -> int:
    if config.model_type == "timm_wrapper":
        return int(timm_probe(config)[0])
    return family.num_prefix(config)


def _square(value: Any, *, where: str) -> int:
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(set(sides[-2:])) != 1:
        raise ModelError("the tower's input is not square", where=where, got=str(value))
    return int(sides[-1])


def tower_grid(config: Any, plan: TowerPlan, *, pixel_shuffle: int, where: str) -> VisionGrid:
    """Returns how many tokens an image becomes.

    Args:
        config: The (cut) config of the encoder.
        plan: Its plan.
        pixel_shuffle: Side of the square of patches that is folded into one token.
        where: Path, for messages.

    Raises:
        ModelError: The patches of the fixed input do not fold evenly, or a class token is in the
            way of folding.
    """
    family = plan.traits
    if config.model_type == "timm_wrapper":
        _, size_px, patch_px = timm_probe(config)
        fixed: int | None = size_px
    else:
        patch_px = family.patch_px(config)
        fixed = _square(config.image_size, where=where) if family.fixed_size else None
    keeps_class = plan.select == "cls_patch"
    if pixel_shuffle > 1 and keeps_class:
        raise ModelError(
            "a class token cannot be folded with patches",
            where="model.connector.pixel_shuffle",
            got=str(pixel_shuffle),
            fix="set model.vision_tower.select=patch or model.connector.pixel_shuffle=1",
        )
    if fixed is not None and (fixed // patch_px) % pixel_shuffle:
        raise ModelError(
            f"{fixed // patch_px} x {fixed // patch_px} patches do not fold into squares of"
            f" {pixel_shuffle} x {pixel_shuffle}",
            where="model.connector.pixel_shuffle",
            fix=f"set model.connector.pixel_shuffle to a divisor of {fixed // patch_px}",
        )
    if plan.scales:
        # The tokens are those of the smallest side; the tower is given the largest.
        check_scales(plan.scales, fixed_px=fixed, patch_px=patch_px, keeps_class=keeps_class)
        patch_px, fixed = patch_px * plan.scales[-1] // plan.scales[0], plan.scales[-1]
    return VisionGrid(
        patch_px=patch_px,
        num_extra_tokens=int(keeps_class),
        downsample=pixel_shuffle,
        fixed_size_px=fixed,
    )


def tower_width(config: Any) -> int:
    """Returns the width of one position's features."""
    if config.model_type == "timm_wrapper":
        return timm_width(config)
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1]) if sizes else int(config.hidden_size)


def features_width(config: Any, plan: TowerPlan) -> int:
    """Returns the width of what the connector is given: that of every scale, joined."""
    return tower_width(config) * max(1, len(plan.scales))


def drop_unused(tower: nn.Module, plan: TowerPlan) -> None:
    """Removes a final norm that the features do not pass and freezes what they never touch."""
    family = plan.traits
    if family.final_norm is not None and not plan.normalised:
        tower.set_submodule(family.final_norm, nn.Identity())
    names = dict(tower.named_parameters())
    for name in family.never_reached:
        if name in names:
            names[name].requires_grad_(False)


def tower_features(tower: nn.Module, plan: TowerPlan, pixel_values_NCYX: Tensor) -> Tensor:
    """Runs a tower and keeps the positions the plan selects.

    Args:
        tower: The encoder.
        plan: Its plan.
        pixel_values_NCYX: Preprocessed images.

    Returns:
        [N, P, D], patches row by row from the top left, behind the class token when it is kept.
    """
    if plan.scales:
        single = dataclasses.replace(plan, scales=())
        return scaled_features(
            lambda pixels: tower_features(tower, single, pixels), pixel_values_NCYX, plan.scales
        )
    if plan.family == "siglip2_vision_model":
        out = tower(**_patchified(tower, pixel_values_NCYX)).last_hidden_state
    else:
        out = tower(pixel_values=pixel_values_NCYX).last_hidden_state
    assert isinstance(out, Tensor)
    if out.dim() == 4:
        return out.flatten(2).transpose(1, 2)
    if plan.num_prefix == 0:
        return out
    patches_NPD = out[:, plan.num_prefix :]
    if plan.select == "patch":
        return patches_NPD
    return out if plan.num_prefix == 1 else torch.cat((out[:, :1], patches_NPD), dim=1)


def _patchified(tower: nn.Module, pixel_values_NCYX: Tensor) -> dict[str, Tensor]:
    """SigLIP 2 takes flattened patches, their grid and a mask of real ones."""
    config: Any = tower.config
    side = int(config.patch_size)
    num_images, _, height, width = pixel_values_NCYX.shape
    rows, columns = height // side, width // side
    patches = pixel_values_NCYX[..., : rows * side, : columns * side]
    patches = patches.reshape(num_images, -1, rows, side, columns, side)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(num_images, rows * columns, -1)
    device = pixel_values_NCYX.device
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(
            num_images, rows * columns, dtype=torch.int64, device=device
        ),
        "spatial_shapes": torch.tensor([[rows, columns]], device=device).expand(num_images, 2),
    }


def pixel_shuffle(
    features_NPD: Tensor, *, factor: int, height_px: int, width_px: int, patch_px: int
) -> Tensor:
    """Folds squares of patches into one position of `factor`^2 times the width.

    Args:
        features_NPD: [N, P, D] with P = rows x columns.
        factor: Side of the square.
        height_px: Height of the tower's input.
        width_px: Width of the tower's input.
        patch_px: Side of a patch.

    Returns:
        [N, P / factor^2, D * factor^2].

    Raises:
        ModelError: Rows or columns are no multiple of `factor`.
    """
    if factor == 1:
        return features_NPD
    rows, columns = height_px // patch_px, width_px // patch_px
    if rows % factor or columns % factor:
        raise ModelError(
            f"{rows} x {columns} patches do not fold into squares of {factor} x {factor}",
            where="model.connector.pixel_shuffle",
            fix="set data.image.size_px so that both sides are multiples of"
            f" {patch_px * factor} px",
        )
    num_images, _, width = features_NPD.shape
    folded = features_NPD.reshape(
        num_images, rows // factor, factor, columns // factor, factor, width
    )
    return folded.transpose(2, 3).flatten(3, 5).flatten(1, 2)


def to_state(plan: TowerPlan) -> dict[str, Any]:
    """Returns a plan as JSON-able values, for a config file."""
    return dataclasses.asdict(plan)
