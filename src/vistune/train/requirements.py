"""What a recipe asks of device and packages, refused before a run is discarded or data is read.

What depends on the model is refused where the model is set up (`train.engine`).
"""

from __future__ import annotations

from vistune.device import Device
from vistune.device.attention import require_attention
from vistune.device.bits import require_bitsandbytes, require_fp8
from vistune.device.transfer import Transfer
from vistune.models.kernels import require_liger
from vistune.models.tune.quantize import QUANTISED_ROLES
from vistune.recipe import Recipe


def require_engine(recipe: Recipe, device: Device) -> None:
    """Refuses settings that no model could have here.

    Args:
        recipe: The recipe.
        device: Where it would run.

    Raises:
        DeviceError: The device does not offer what a setting names.
        MissingExtraError: A package is not installed.
    """
    train = recipe.train
    require_attention(train.attention, device.torch_device, device.dtype)
    if train.kernels == "liger":
        require_liger(device.torch_device)
    if train.optimizer == "adamw_8bit":
        require_bitsandbytes("train.optimizer=adamw_8bit")
    if train.offload.activations or train.offload.optimizer:
        Transfer(device.torch_device)
    for role in QUANTISED_ROLES:
        held = recipe.tune.held_format(role)
        if held == "fp8":
            require_fp8(device.torch_device)
        elif held != "same":
            require_bitsandbytes(f"tune.{role}.frozen_format={held}")
