"""Rows in ``rows.csv``, each on disk once it is measured, and a line for each on the screen."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.device.jobs import Job
from diffusion_backbones.reports.measurements import SPEED

Row = Mapping[str, Any]
with SPEED.open(newline="") as _file:
    COLUMNS = (*next(csv.reader(_file)), "note")
HOOKS = "whole network, read with hooks"


class Table:
    """The rows of a run.

    Args:
        file: Is written anew.
        command: The command, for the rows.
    """

    def __init__(self, file: Path, command: str):
        self.command, self.hooks = command, {}
        self.file = file.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")
        self.writer.writeheader()

    def write(self, job: Job, row: Row) -> None:
        """Write a row of a job at once. Its speed is how many times as fast as the first whole network it is."""
        asked = {
            "way": job.measure if job.measure != "speed" else job.instead or "backbone",
            "backbone": job.backbone,
            "options": " ".join(f"{key}={value}" for key, value in job.options.items()),
            "dtype": job.dtype,
            "command": self.command,
        }
        row = {**asked, **row, "command": self.command}
        key = (row["backbone"], row.get("batch"))
        if row.get("seconds") and row["way"] == HOOKS:
            self.hooks.setdefault(key, row["seconds"])
        if row.get("seconds") and key in self.hooks:
            row["speed"] = self.hooks[key] / row["seconds"]
        self.writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        print(_line(row), flush=True)


def _line(row: Row) -> str:
    parts = [f"{row['backbone']} {row['dtype']} x{row.get('batch') or '-'}", row["options"], f"{row['way']}:"]
    if row.get("seconds"):
        parts.append(f"{1000 * row['seconds'] / row['batch']:.2f} ms/image")
    for column, text in (("speed", "{:.2f}x"), ("share_of_matmul", "{:.2f} of matmul"), ("load_seconds", "{:.1f} s")):
        if row.get(column):
            parts.append(text.format(row[column]))
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 1e9:.2f} GB")
    if row["way"] == "product of matrices":
        parts.append(f"{row['matmul_gflops'] / 1000:.1f} TFLOP/s")
    return " ".join([*filter(None, parts), *([f"({row['note']})"] if row.get("note") else [])])


def keep(file: Path, table: Path = SPEED) -> int:
    """Append the timed rows of a run to the table that travels with the package; how many they were.

    Raises:
        ValueError: They are a rehearsal's.
    """
    with file.open(newline="") as rows:
        found = [row for row in csv.DictReader(rows) if row["seconds"] and row["speed"] and row["torch"]]
    if any("--rehearse" in row["command"] for row in found):
        raise ValueError(f"{file} is a rehearsal on tiny networks; keep the rows of a run on a device")
    with table.open("a", newline="") as kept:
        csv.DictWriter(kept, COLUMNS[:-1], extrasaction="ignore").writerows(found)
    return len(found)
