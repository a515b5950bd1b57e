"""The type of a whole vision-language model: composed, of a family, or one of transformers.

Only annotations need it; what the engines ask of a model is `models.contract`.
"""

from __future__ import annotations

from typing import TypeAlias

from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration
from vistune.models.compose import ComposedVLM
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.native.model import NativeVLM
from vistune.models.visualglm import VisualGLMForConditionalGeneration

FamilyModel: TypeAlias = (
    CogVLM2ForConditionalGeneration
    | MGMForConditionalGeneration
    | VisualGLMForConditionalGeneration
)
"""A model of a family, whole as it was published."""

WholeModel: TypeAlias = ComposedVLM | FamilyModel | NativeVLM
"""Any model that vistune trains."""
