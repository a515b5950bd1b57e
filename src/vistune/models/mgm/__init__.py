"""MGM (Mini-Gemini) on Gemma: settings, towers, mining, model, public tensor names."""

from vistune.models.mgm.configuration import MGMConfig
from vistune.models.mgm.modeling import MGMForConditionalGeneration

__all__ = ["MGMConfig", "MGMForConditionalGeneration"]
