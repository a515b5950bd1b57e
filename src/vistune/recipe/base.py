"""The base of every recipe section: frozen, unknown keys refused, docstrings are the help text.

The kinds of number that keys hold stand here too.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Auto: TypeAlias = Literal["auto"]
PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
NonNegativeInt: TypeAlias = Annotated[int, Field(ge=0)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]
Frac: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of recipe keys. A field's docstring is its help, its schema and its manual."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
