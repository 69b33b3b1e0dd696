"""Tables of results in CSV files that grow from run to run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_backbones.ops import atomic

Row = Mapping[str, Any]


def check(path: Path | None, columns: Sequence[str]) -> None:
    """Check that rows can be written to a file, if there is to be one, before what they say is measured.

    Raises:
        ValueError: It is a file with other columns, and stays as it is.
        OSError: It cannot be written.
    """
    if path:
        _read(path, columns)
        atomic.check_writable(path)


def update(path: Path, columns: Sequence[str], change: Callable[[list[Row]], Sequence[Row]]) -> None:
    """Write a table whole or not at all; of several processes, one at a time does so.

    Args:
        path: The file; its folder is made if it does not exist.
        columns: Names of the columns, in order.
        change: The rows so far -> the rows that are written.

    Raises:
        ValueError: It is a file with other columns, and stays as it is.
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.holding(path.parent):
        rows = change(_read(path, columns))
        with atomic.replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    if not path.exists() or not path.stat().st_size:
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or [])
            rows: list[Row] = list(reader) if found == list(columns) else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of this kind ({error}); choose another file") from error
    if found != list(columns):
        raise ValueError(
            f"{path} is no table of this kind: it begins with {','.join(found)!r:.60} and not with "
            f"{','.join(columns)!r:.60}; choose another file"
        )
    return rows
