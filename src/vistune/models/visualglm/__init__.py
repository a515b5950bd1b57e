"""VisualGLM: settings, model, tensor names of its public layouts, and input construction."""

from vistune.models.visualglm.configuration import VisualGLMConfig
from vistune.models.visualglm.modeling import VisualGLMForConditionalGeneration

__all__ = ["VisualGLMConfig", "VisualGLMForConditionalGeneration"]
