"""What the profile's keys hold: the base of every TOML table, and the types of values that several of them share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TEMPLATE_SETS = ("openai-imagenet", "simple-imagenet")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


Listed = BeforeValidator(_tuple)
"""Takes TOML's list where a field is a tuple."""
Strings = Annotated[tuple[str, ...], Listed]
Templates = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Limit = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Number = Literal["float32", "float16", "bfloat16"]


class Section(BaseModel):
    """One TOML table: frozen, unknown keys forbidden, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
