"""How a built model computes in this run: attention, kernels, recomputation, each said once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from vistune.device import Device
from vistune.recipe import Recipe
from vistune.train.modes import let_layers_recompute, set_training_mode

if TYPE_CHECKING:
    from vistune.models.whole import WholeModel


def set_up_engine(
    model: WholeModel, recipe: Recipe, device: Device, console: Console
) -> dict[str, Any]:
    """Puts in place how a model computes.

    Args:
        model: On its device, with what trains chosen and weights in place.
        recipe: Settled.
        device: The device.
        console: Every choice is printed with its reason.

    Returns:
        The choices, for the record of the run.

    Raises:
        ModelError: Something asked for has no form for this model.
        DeviceError: Something asked for is not on this device.
        MissingExtraError: A package is not installed.
    """
    from vistune.models.attention.install import install_attention
    from vistune.models.compose import ComposedVLM
    from vistune.models.fused.install import install_fused
    from vistune.models.recompute import set_checkpoint_layers

    train, language = recipe.train, recipe.tune.language
    assert train.checkpoint_layers != "auto", "it was settled before"

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    set_training_mode(model, recipe.tune, model.module_map)
    set_checkpoint_layers(model, train.checkpoint_layers)
    let_layers_recompute(model)
    attention = install_attention(
        model,
        wanted=train.attention,
        dtype=device.dtype,
        device=device.torch_device,
        drops_weights=language.mode != "freeze",
    )
    say(str(attention))
    fused = install_fused(
        model,
        mode=train.fused,
        fp8=language.mode != "full" and language.frozen_format == "fp8",
        num_recomputed=train.checkpoint_layers,
    )
    say(fused)
    if isinstance(model, ComposedVLM) and model.fused is not None:
        model.fused.backend = attention.backend
    return {"attention": attention.to_json(), "layers": fused}
