"""Checks of what people write: unknown names with the closest known ones, and numbers out of range."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The tail of an error message: ``" Did you mean a, b or c?"``, or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(filter(None, [", ".join(matches[:-1]), matches[-1]])) + "?"


def check_fields(cls: type, given: Mapping[str, Any], what: str) -> None:
    """Raise ``TypeError`` with the closest match for the first key of ``given`` that is no field of ``cls``."""
    known = [f.name for f in fields(cls)]
    for key in given:
        if key not in known:
            raise TypeError(f"{what} has no setting {key!r}.{closest(key, known)} It has: {', '.join(known)}.")


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer from 1 up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer from 1 up, got {value!r}")
