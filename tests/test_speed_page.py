"""The speed page: ratios that a reader can divide, one table a machine, and no benchmark on the model cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_backbones.evaluation.benchmark import Timing
from diffusion_backbones.reports import measurements

ROOT = Path(__file__).parents[1]
HOOKS = "whole network, read with hooks"
RUN = ("command", "hardware", "date", "backbone", "batch")
"""What the rows of a run share that are compared with each other."""


def test_speeds_are_ratios_of_the_medians_that_are_printed():
    hooks = {}
    for row in measurements.speed():
        if row["way"] == HOOKS:
            hooks.setdefault(tuple(row[key] for key in RUN), float(row["seconds"]))
    for row in measurements.speed():
        ratio = hooks[tuple(row[key] for key in RUN)] / float(row["seconds"])
        assert float(row["speed"]) == pytest.approx(ratio, rel=1e-3), row
    assert Timing("a", (1.0, 2.0, 9.0)).speed(Timing("b", (6.0, 6.0, 1.0))) == 6 / 2


def test_every_machine_stands_once_above_its_table():
    tables = measurements.speed_tables(measurements.speed())
    machines = {(row["hardware"], row["torch"], row["date"]) for row in measurements.speed()}
    assert tables.count("| backbone | way |") == tables.count("**") / 2 == len(machines)
    for hardware, torch, date in machines:
        assert tables.count(f"**{hardware}, torch {torch}, {date}**") == tables.count(hardware) == 1
    assert tables.count("\n| `") == len(measurements.speed())
    assert tables in (ROOT / "docs" / "speed.md").read_text()


def test_cards_hold_no_benchmark():
    cards = list((ROOT / "model_cards").glob("*.md"))
    assert cards
    assert not [card.name for card in cards if "ms/image" in card.read_text()]
