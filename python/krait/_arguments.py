"""Arguments of the wrong kind, refused by the name that the caller knows them under."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = [
    "instance",
    "integer",
    "number",
    "optional_path",
    "optional_text",
    "path",
    "probability",
    "text",
    "texts",
    "unsigned",
]

_T = TypeVar("_T")


def _refuse(name: str, value: Any, expected: str) -> TypeError:
    shown = repr(value)
    if len(shown) > 60 or "\n" in shown:
        shown = f"of type {type(value).__name__}"
    return TypeError(f"{name} is {shown}, expected {expected}")


def instance(name: str, value: Any, kind: type[_T]) -> _T:
    """`value`; TypeError where it is not of the class `kind`."""
    if not isinstance(value, kind):
        raise _refuse(name, value, f"a {kind.__name__}")
    return value


def integer(name: str, value: Any) -> int:
    """An int of 64 bits; TypeError for what is no integer, ValueError for a longer one."""
    try:
        found = operator.index(value)
    except TypeError:
        raise _refuse(name, value, "an integer") from None
    if not -(1 << 63) <= found < 1 << 63:
        raise ValueError(f"{name} is {found}, expected an integer of 64 bits")
    return found


def unsigned(name: str, value: Any) -> int:
    """An integer from 0 to 2^64 - 1, as the C ABI takes it: its bits as those of a signed one."""
    try:
        found = operator.index(value)
    except TypeError:
        raise _refuse(name, value, "an integer") from None
    if not 0 <= found < 1 << 64:
        raise ValueError(f"{name} is {found}, expected 0 to 2**64 - 1")
    return found - (1 << 64) if found >= 1 << 63 else found


def number(name: str, value: Any) -> float:
    """A float; TypeError for texts and what is no number."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise _refuse(name, value, "a number")


def probability(name: str, value: Any) -> float:
    """A number from 0 to 1; ValueError for others."""
    found = number(name, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name} is {found:g}, expected 0 to 1")
    return found


def text(name: str, value: Any) -> str:
    """A str that UTF-8 can hold; TypeError for another type, ValueError for half a character."""
    if not isinstance(value, str):
        raise _refuse(name, value, "a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has the lone surrogate U+{ord(value[error.start]):04X} at position "
            f"{error.start}, expected characters that UTF-8 has"
        ) from None
    return value


def optional_text(name: str, value: Any) -> str | None:
    """The same, or None."""
    return None if value is None else text(name, value)


def texts(name: str, values: Any) -> list[str]:
    """A list of str, from one or from several."""
    if isinstance(values, str):
        return [text(name, values)]
    if not isinstance(values, Iterable) or isinstance(values, bytes):
        raise _refuse(name, values, "a str or several")
    return [text(f"{name}[{index}]", value) for index, value in enumerate(values)]


def path(name: str, value: Any) -> str:
    """A path as str; TypeError for what is none, ValueError for an empty one."""
    try:
        found = os.fsdecode(value)
    except TypeError:
        raise _refuse(name, value, "a path") from None
    if not found:
        raise ValueError(f"{name} is empty, expected a path")
    return found


def optional_path(name: str, value: Any) -> str | None:
    """The same, or None."""
    return None if value is None else path(name, value)
