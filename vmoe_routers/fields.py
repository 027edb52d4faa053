"""check_fields: refuses values of a dataclass that are not of the kinds of their type hints."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vmoe_routers.options import OptionError


def check_fields(options: Any) -> None:
    """Checks the fields of a dataclass, whose values may come from JSON or YAML.

    Raises:
        OptionError: A value is not of the kind of its type hint.
    """
    for name, kind in get_type_hints(type(options)).items():
        check_field(name, getattr(options, name), kind)


def check_field(name: str, value: Any, kind: Any) -> None:
    """Checks one value, as `check_fields` does."""
    if not _is_of(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
        wanted = wanted.replace("typing.", "").replace("pathlib.", "")
        raise OptionError(f"{name} must be {wanted}, got {value!r}", name)


def _is_of(value: Any, kind: Any) -> bool:
    """Tells whether a value is of the kind of a type hint. A list may replace a tuple, and a str a Path."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_is_of, value, parts))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_of(part, parts[0]) for part in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _is_of(key, parts[0]) and _is_of(part, parts[1]) for key, part in value.items()
        )
    if parts:  # a union
        return any(_is_of(value, part) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: Real, Path: (str, Path)}.get(kind, kind))
