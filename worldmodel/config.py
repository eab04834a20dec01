"""Frozen dataclasses as the description of a YAML file: every key and value is checked, nothing is
guessed or ignored.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml

from worldmodel.errors import UserError, first_line


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes; stands in its annotation, `Annotated[int, Range(1)]`."""

    low: float
    high: float = math.inf
    open: bool = False  # `low` is left out

    def __contains__(self, number: float) -> bool:
        return (self.low < number if self.open else self.low <= number) and number <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.open else 'at least'} {self.low}" + (
            f" and at most {self.high}" if self.high < math.inf else ""
        )


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a table of keys and values",
}


def build(kind: type, values: object, where: str):
    """Makes the (nested, frozen) dataclass `kind` from plain YAML values; `where` begins the error
    messages.

    Lists become tuples, a whole number may stand for a float, and so may a text such as 1e-4, which
    YAML does not take for a number.
    Errors: UserError for an unknown key (names the nearest known one), a missing key, a wrong
    kind, a number out of its range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of {kind.__name__} options, got {values!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
    for field in dataclasses.fields(kind):
        if (
            field.name not in values
            and field.default is MISSING
            and field.default_factory is MISSING
        ):
            raise UserError(f"{where}: the key {field.name!r} is missing")
    made = {key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**made)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_yaml(text: str) -> object:
    """The plain values of a YAML text. Raises UserError with the reason where it is not valid."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: of a date such as 2020-99-99
        raise UserError(" ".join(str(error).split())) from None


def read_yaml(path: Path, thing: str) -> object:
    """The plain values of a YAML file that belongs to a downloaded `thing`, such as "world". Raises
    UserError where it cannot be read.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(
            f"{path} cannot be read as YAML ({first_line(error)}); fetch the {thing} again."
        ) from None


def as_dict(options) -> dict:
    """The dataclass as plain YAML or JSON values (tuples become lists)."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return as_dict(value)
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    return {
        field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)
    }


def _value(hint, value, where: str):
    """One checked and converted value."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is Annotated:
        number = _value(inner[0], value, where)
        if number not in inner[1]:
            raise UserError(f"{where} must be {inner[1]}, got {value!r}")
        return number
    if origin is Literal:
        if value in inner:
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, inner))}, got {value!r}")
    if origin is types.UnionType:  # `str | None`
        return None if value is None else _value(inner[0], value, where)
    if origin is tuple:
        count = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        if isinstance(value, list | tuple) and (not count or len(value) == len(inner)):
            return tuple(_value(inner[0], item, where) for item in value)
        raise UserError(f"{where} must be a list{count}, got {value!r}")
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(inner[1], one, where) for key, one in value.items()}
    if hint is float and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif (
        hint in (int, bool, str)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise UserError(f"{where} must be {_KINDS[origin or hint]}, got {value!r}")
