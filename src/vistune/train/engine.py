"""How a built model computes in this run: attention, kernels, recomputation, each said once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from vistune.device import Device, has_triton
from vistune.models.modes import let_layers_recompute, set_training_mode
from vistune.recipe import Recipe

if TYPE_CHECKING:
    from vistune.models.attention.install import InstalledAttention
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
    from vistune.models.compiled import compile_blocks
    from vistune.models.kernels import install_kernels

    def say(text: str) -> str:
        if text:
            console.print(text, soft_wrap=True, highlight=False, markup=False)
        return text

    train = recipe.train
    attention, layers, runs_fused = _set_up_layers(model, recipe, device)
    say(str(attention))
    say(layers)
    kernels = install_kernels(
        model, wanted=train.kernels, fused=runs_fused, device=device.torch_device
    )
    say(str(kernels))
    compiled = ""
    if train.compile:
        compiled = compile_blocks(
            model, mode=train.compile, fused=runs_fused, attention=attention.language.name
        )
    elif _would_gain(recipe, device, fused=runs_fused, attention=attention.language.name):
        say(
            "compiled: nothing; with train.compile=blocks a step of such layers took 0.5 to 0.7 of"
            " the time on an H200, after 15 to 50 s at the start"
        )
    return {
        "attention": attention.to_json(),
        "layers": layers,
        "kernels": {"name": kernels.name, "reason": kernels.reason},
        "compiled": say(compiled),
        "offload": say(_offload(recipe, device)),
    }


def _would_gain(recipe: Recipe, device: Device, *, fused: bool, attention: str) -> bool:
    """Whether compiled blocks are worth a word: measured on an H200 (bench/README.md)."""
    waits = recipe.train.offload.activations or attention == "flex"
    return not fused and not waits and has_triton(device.torch_device)


def _set_up_layers(
    model: WholeModel, recipe: Recipe, device: Device
) -> tuple[InstalledAttention, str, bool]:
    """Returns how attention is computed, what the decoder's layers run as, and if that is fused."""
    from vistune.models.attention.install import install_attention
    from vistune.models.fused.install import fused_trunk, install_fused
    from vistune.models.offload import InputStore
    from vistune.models.recompute import set_checkpoint_layers

    train, language = recipe.train, recipe.tune.language
    assert train.checkpoint_layers != "auto", "it was settled before"
    set_training_mode(model, recipe.tune, model.module_map)
    store = InputStore(device.torch_device) if train.offload.activations else None
    set_checkpoint_layers(model, train.checkpoint_layers, store=store)
    if train.checkpoint_tower_layers:
        set_checkpoint_layers(model, train.checkpoint_tower_layers, role="vision")
    let_layers_recompute(model)
    attention = install_attention(
        model,
        wanted=train.attention,
        dtype=device.dtype,
        device=device.torch_device,
        drops_weights=language.mode != "freeze",
        opaque=bool(train.compile),
    )
    layers = install_fused(
        model,
        mode=train.fused,
        fp8=recipe.tune.held_format("language") == "fp8",
        num_recomputed=train.checkpoint_layers,
    )
    trunk = fused_trunk(model)
    if trunk is not None:
        trunk.backend = attention.backend
        trunk.store = store
    return attention, layers, trunk is not None


def _offload(recipe: Recipe, device: Device) -> str:
    """Says what waits in the host's memory; empty when nothing does."""
    train = recipe.train
    waiting = []
    if train.offload.activations and train.checkpoint_layers:
        waiting.append(f"inputs of {train.checkpoint_layers} recomputed layers")
    if train.offload.optimizer:
        waiting.append("optimizer state")
    if not waiting:
        # `auto` found that nothing need be recomputed; a fixed number of 0 is refused before.
        asked = train.offload.activations
        return "in the host's memory: nothing, as no layer is recomputed" if asked else ""
    where = " (which is the device's: nothing is gained)" if device.kind == "cpu" else ""
    return f"in the host's memory{where}: {', '.join(waiting)}"
