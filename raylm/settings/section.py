"""What every section of the settings is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of the settings: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _from_percent(value: object) -> object:
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _share_or_number(value: float | int) -> float | int:
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError("a share between 0 and 1, such as 0.01 or 1%, or a whole number of rows")
    return value


ShareOrNumber = Annotated[float | int, BeforeValidator(_from_percent), AfterValidator(_share_or_number)]
"""How many rows, as a share of all (`0.01`, `1%`) or as a number (`20`)."""


def _ascending(value: object) -> object:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("the fewest and the most, such as [1, 4]")
    return value


Ascending = AfterValidator(_ascending)
"""Of a value that may be a range: `[fewest, most]`."""

Workers = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], int], Ascending]
"""How many workers: as many as suit the cluster, a number, or the fewest and the most."""


def is_within(limit: float | int, rows: int, of: int) -> bool:
    """Whether so many rows of all are no more than a `ShareOrNumber` allows."""
    return rows <= (limit * of if isinstance(limit, float) else limit)


def limit_text(limit: float | int) -> str:
    """A `ShareOrNumber` as an error says it."""
    return f"{limit:.2%} of the rows" if isinstance(limit, float) else f"{limit} rows"
