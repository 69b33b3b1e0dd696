"""Checks of what people write: names, types and ranges. Each error says what was given and what was expected."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from diffusion_backbones.spec.suggestions import closest as closest

_PYTHON = {"array": "list", "object": "mapping", "null": "None"}
"""msgspec names types as JSON does."""


def check_fields(cls: type, given: Mapping[str, Any], what: str) -> None:
    """Check the keys of a mapping, and of mappings inside it, against the fields of a dataclass or named tuple.

    Args:
        cls: Its annotations are the known keys.
        given: Key -> value.
        what: Names the mapping in the error.

    Raises:
        TypeError: A key is not a field; the closest fields are named.
    """
    known = inspect.get_annotations(cls)
    for key, value in given.items():
        if key not in known:
            raise TypeError(f"{what} has no setting {key!r}.{closest(str(key), known)} It has: {', '.join(known)}.")
        if isinstance(value, Mapping):
            kind = get_type_hints(cls)[key]  # such as ``Paper | None``
            for inner in (k for k in (kind, *get_args(kind)) if isinstance(k, type) and is_dataclass(k)):
                check_fields(inner, value, f"{what}: {key}")


def convert(value: Any, kind: Any, what: str) -> Any:
    """``value`` as a type, after a strict check: a list becomes a tuple and a mapping a dataclass, but no other type is
    replaced.

    Args:
        value: Plain data, such as JSON gives, or instances of ``kind``.
        kind: A type, also ``Annotated`` with the range that :class:`msgspec.Meta` states.
        what: Names the value in the error.

    Raises:
        ValueError: A type or a value that does not fit; the error gives its path, such as ``recipe: levels[1]``.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        where = f"{what}: {path.lstrip('.')}" if path.startswith(".") else what + path
        raise ValueError(f"{where}: {_explain(message, _at(value, path), _kind_at(kind, path))}") from error


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _at(value: Any, path: str) -> Any:
    """What lies at a path such as ``.paper.year`` or ``[1]`` of plain data."""
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[key] if key else value[int(index)]
    return value


def _kind_at(kind: Any, path: str) -> Any:
    """The annotation of a field at a path such as ``.noise``; ``kind`` itself for other paths."""
    return get_type_hints(kind).get(path[1:], kind) if path.startswith(".") else kind


def _explain(message: str, value: Any, kind: Any) -> str:
    """msgspec's message with the value that was given."""
    if get_origin(kind) is Literal:
        known = get_args(kind)
        return f"expected one of {', '.join(known)}, got {value!r}.{closest(str(value), known)}"
    if not message.startswith("Expected "):
        return message.replace("Object missing required field", "lacks the field").replace("`", "'")
    expected = re.sub(r"`(.*?)`", lambda match: _in_python(match[1]), message.partition(", got ")[0])
    return f"e{expected[1:]}, got {value!r}"


def _in_python(types: str) -> str:
    return " or ".join(_PYTHON.get(name, name) for name in types.split(" | "))


MOST = 2**31 - 1
"""The largest count: what every library takes."""


def as_integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch as Python's; None for every other value, truth values among them."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if getattr(value, "ndim", None):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_count(name: str, value: Any) -> int:
    """``value`` as an integer; ``ValueError`` unless it is one from 1 up."""
    count = as_integer(value)
    if count is None or not 1 <= count <= MOST:
        most = "" if count is None or count < 1 else f" to {MOST}"
        raise ValueError(f"{name} must be an integer from 1 up{most}, got {value!r}")
    return count


def check_flag(name: str, value: Any) -> bool:
    """``value`` as a truth value; ``TypeError`` unless it is one of Python or numpy."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")
