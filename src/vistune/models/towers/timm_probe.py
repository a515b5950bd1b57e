"""What a timm model's features look like, asked of the model itself on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistune.errors import MissingExtraError


def timm_probe(config: Any) -> tuple[int, int, int]:
    """Returns (prefix positions, input side, pixels per position) of a timm model.

    Args:
        config: Its config.

    Raises:
        MissingExtraError: timm is not installed.
    """
    model = _on_meta(config)
    size_px = int(model.timm_model.pretrained_cfg["input_size"][-1])
    out = _features(model, size_px)
    if out.dim() == 4:
        return 0, size_px, size_px // int(out.shape[-1])
    prefix = int(getattr(model.timm_model, "num_prefix_tokens", 0))
    side = round((int(out.shape[1]) - prefix) ** 0.5)
    return prefix, size_px, size_px // side


def timm_width(config: Any) -> int:
    """Returns the width of a timm model's features.

    Args:
        config: Its config.
    """
    model = _on_meta(config)
    out = _features(model, int(model.timm_model.pretrained_cfg["input_size"][-1]))
    return int(out.shape[1] if out.dim() == 4 else out.shape[-1])


def _on_meta(config: Any) -> Any:
    try:
        import timm  # noqa: F401
    except ImportError:
        raise MissingExtraError.of("timm", extra="timm", purpose="a timm vision tower") from None
    from transformers import TimmWrapperModel

    with torch.device("meta"):
        return TimmWrapperModel(config)


def _features(model: Any, size_px: int) -> Tensor:
    with torch.no_grad():
        out = model(
            pixel_values=torch.zeros(1, 3, size_px, size_px, device="meta")
        ).last_hidden_state
    assert isinstance(out, Tensor)
    return out
