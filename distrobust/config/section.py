"""What all sections of a configuration share: frozen values, documented where they are defined, no unknown keys."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _fraction(value: object) -> object:
    """'8/255' -> 0.0314: budgets are written as fractions of the pixel range."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


AsFraction = BeforeValidator(_fraction)
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Density = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Seconds = Annotated[float, Field(ge=0.0)]
Multiplier = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*([kMGT]i?)?$")]
Budget = Annotated[float, AsFraction, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )
