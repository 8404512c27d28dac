"""What the profile's keys hold: the base of every TOML table, and the types of values that several of them share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

TEMPLATE_SETS = ("openai-imagenet", "simple-imagenet")
MOVING = frozenset({"main", "master", "HEAD"})
"""Names of what a repository holds today, whatever that is."""


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _fixed(revision: str) -> str:
    if revision in MOVING or revision.startswith("refs/"):
        raise ValueError("a branch moves, so it does not say which weights these are: give a commit of the repository")
    return revision


Listed = BeforeValidator(_tuple)
"""Takes TOML's list where a field is a tuple."""
Strings = Annotated[tuple[str, ...], Listed]
Templates = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Limit = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Revision = Annotated[str, AfterValidator(_fixed)]
"""Commit (or tag) of a repository on a hub; empty where there is none."""
Number = Literal["float32", "float16", "bfloat16"]


class Section(BaseModel):
    """One TOML table: frozen, unknown keys forbidden, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
