"""The public model families vistune knows by name; importing this fills the registries."""

from vistune.models.families import cogvlm2, internlm2, llava_language, mgm, visualglm
from vistune.models.families.contract import (
    FAMILIES,
    LANGUAGE_FAMILIES,
    Family,
    LanguageFamily,
    detect,
)

__all__ = [
    "FAMILIES",
    "LANGUAGE_FAMILIES",
    "Family",
    "LanguageFamily",
    "cogvlm2",
    "detect",
    "internlm2",
    "llava_language",
    "mgm",
    "visualglm",
]
