"""The public model families vistune knows by name; importing this fills the registries."""

from vistune.models.families.contract import FAMILIES, LANGUAGE_FAMILIES, Family, detect

__all__ = ["FAMILIES", "LANGUAGE_FAMILIES", "Family", "detect"]
