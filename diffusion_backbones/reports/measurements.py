"""Measured numbers that travel with the package: published results, speed, and how far tiny encoders are from exact."""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffusion_backbones.reports.markdown import number, table

DATA = Path(__file__).with_name("data")
RESULTS, SPEED, DEVIATIONS = DATA / "results.csv", DATA / "speed.csv", DATA / "deviations.csv"
"""Numbers that publications print; rows of ``diffusion-backbones bench --csv``; rows of ``diffusion-backbones compare
--csv``.
"""

Row = Mapping[str, str]
"""Column -> text."""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a head."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def results() -> dict[str, list[dict[str, str]]]:
    """Published numbers by backbone."""
    return _by_backbone(RESULTS)


@functools.cache
def deviations() -> dict[str, list[dict[str, str]]]:
    """Distance between features with a tiny encoder and the exact ones, by backbone."""
    return _by_backbone(DEVIATIONS)


@functools.cache
def speed() -> list[dict[str, str]]:
    """Measured speed, in the order in which it was measured."""
    return read(SPEED)


def _by_backbone(path: Path) -> dict[str, list[dict[str, str]]]:
    rows = sorted(read(path), key=lambda row: row["backbone"])
    return {name: list(group) for name, group in itertools.groupby(rows, lambda row: row["backbone"])}


_RESULTS = ("task", "dataset", "protocol", "metric", "value", "source")


def results_table(rows: Iterable[Row]) -> tuple[str, list[str]]:
    """Rows of :func:`results` as a table, empty without any, and the caveats that its last column counts from 1."""
    rows = list(rows)
    if not rows:
        return "", []
    caveats = list(dict.fromkeys(row["caveat"] for row in rows if row["caveat"]))
    lines = [
        [*(row[column] for column in _RESULTS), str(caveats.index(row["caveat"]) + 1) if row["caveat"] else ""]
        for row in rows
    ]
    return table([*_RESULTS, "caveat"], lines), caveats


_DEVIATIONS = {
    "level": "level",
    "channels": "channels",
    "stride": "stride",
    "relative error": "error",
    "cosine similarity": "cosine",
}


def deviations_table(rows: Iterable[Row]) -> str:
    """Rows of :func:`deviations` as a table."""
    return table(list(_DEVIATIONS), [[row[column] for column in _DEVIATIONS.values()] for row in rows])


_SPEED = {"of matmul": ("share_of_matmul", 1, 2), "loaded in s": ("load_seconds", 1, 1), "GB": ("peak_bytes", 1e-9, 2)}
"""Heading -> column of ``speed.csv``, its factor, digits."""


def speed_tables(rows: Iterable[Row]) -> str:
    """Rows of :func:`speed` as a table for each machine and PyTorch, which stand once above it: milliseconds an image,
    speed relative to hooks by the medians, share of a matrix product, seconds to load and gigabytes.
    """
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        where = f"{row['hardware']}, torch {row['torch']}, {row['date']}"
        tables.setdefault(where, []).append(_speed_line(row))
    head = ["backbone", "way", "options", "input", "ms/image", "speed", *_SPEED]
    return "\n\n".join(f"**{where}**\n\n{table(head, lines)}" for where, lines in tables.items())


def _speed_line(row: Row) -> list[str]:
    milliseconds = 1000 * float(row["seconds"]) / int(row["batch"])
    return [
        f"`{row['backbone']}`",
        row["way"],
        row["options"] or "",
        f"{row['size']} px, batch {row['batch']}, {row['dtype']}",
        number(milliseconds, 0 if milliseconds >= 100 else 1),
        number(float(row["speed"]), 2),
        *(number(by * float(row[key]), digits) if row[key] else "" for key, by, digits in _SPEED.values()),
    ]
