"""What was probably meant: the known names that are nearest to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> list[str]:
    """The known names that are nearest to a name, the nearest first; at most ``n``, and none that is more than twice as
    far as the first.

    Args:
        name: What was given.
        known: What exists.
        n: How many at most.
        cutoff: Least similarity, 0 to 1, in the sense of :func:`difflib.get_close_matches`.
    """
    written = {_plain(candidate): candidate for candidate in reversed(list(known))}
    similar = difflib.get_close_matches(_plain(name), written, n=20, cutoff=cutoff)
    far = {candidate: edits(_plain(name), candidate) for candidate in similar}
    limit = 2 * min(far.values(), default=0)
    return [written[c] for c in sorted(similar, key=far.__getitem__) if far[c] <= limit][:n]


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The tail of an error message: ``" Did you mean a, b or c?"``, or nothing when no known name is near."""
    matches = nearest(name, known, n)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(filter(None, [", ".join(matches[:-1]), matches[-1]])) + "?"


def edits(a: str, b: str) -> int:
    """How many letters must be inserted, dropped, replaced, or swapped with their neighbors to make ``b`` of ``a``
    (optimal string alignment).
    """
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def _plain(name: str) -> str:
    """A name without what people mix up: capitals, and the three ways to join words."""
    return name.lower().replace("_", "-").replace(" ", "-")
