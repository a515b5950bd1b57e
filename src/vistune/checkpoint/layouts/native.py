"""Transformers' own vision-language models, in the directories that transformers writes."""

from vistune.models.native import NATIVE
from vistune.models.native import describe_native as describe
from vistune.models.native import is_native as matches
from vistune.models.native import load_native as load

NAMES = tuple(NATIVE)

__all__ = ["NAMES", "describe", "load", "matches"]
