"""CogVLM2: a Llama-3 decoder with visual experts behind an EVA2-CLIP-E tower."""

from vistune.models.cogvlm2.config import CogVLM2Config, CogVLM2VisionConfig
from vistune.models.cogvlm2.model import (
    CogVLM2ForConditionalGeneration,
    image_defaults,
    vision_grid,
)

__all__ = [
    "CogVLM2Config",
    "CogVLM2ForConditionalGeneration",
    "CogVLM2VisionConfig",
    "image_defaults",
    "vision_grid",
]
