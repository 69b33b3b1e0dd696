"""The yardstick's commands: what they measure, print and write."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import evaluate
import intervals
import sample
import table


def test_figures_come_into_the_table_and_into_the_document(tmp_path, monkeypatch):
    rows = [
        {"features": name, "metric": metric, "value": "1.5", "low": "1.0", "high": "2.0", "units": "9"}
        for name in ("rgb", "gdf")
        for metric in ("mIoU", "PCK")
    ]
    made = table.table(rows[:3])
    assert made.splitlines() == [
        "| features | mIoU | PCK |",
        "| --- | --- | --- |",
        "| `rgb` | 1.5 [1.0, 2.0] | 1.5 [1.0, 2.0] |",
        "| `gdf` | 1.5 [1.0, 2.0] |  |",
    ]
    wide = table.table([{**rows[0], "metric": f"m{i}"} for i in range(7)])
    assert [line for line in wide.splitlines() if "features" in line] == [
        "| features | m0 | m1 | m2 | m3 | m4 |",
        "| features | m5 | m6 |",
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:3])
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- photographs -->\nold\n<!-- /photographs -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "t.csv"), str(document)])
    table.main()
    assert document.read_text() == f"before\n<!-- photographs -->\n{made}<!-- /photographs -->\nafter\n"
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="0 times"):
        table.main()


def test_the_yardstick_measures_an_untrained_network_three_times(monkeypatch):
    seen = []

    def features(name, seed, *_):
        seen.append((name, seed))
        return seed

    def task(seed):
        return {"right": intervals.Outcome(np.array([[seed, 2], [seed, 2]]), intervals.share)}

    monkeypatch.setattr(evaluate, "features", features)
    (row,) = evaluate.measure("untrained", {"task": task}, None, None)
    assert row == {
        "features": "untrained",
        "metric": "right",
        "value": "50.0",
        "low": "50.0",
        "high": "50.0",
        "units": "2",
    }
    assert seen == [("untrained", seed) for seed in (0, 1, 2)]
    evaluate.measure("tinysd_gdf", {"task": task}, None, None)
    assert seen[3:] == [("tinysd_gdf", 0)]
    with pytest.raises(SystemExit, match=r"camvid needs --photographs DATA"):
        evaluate.tasks(argparse.Namespace(only=["camvid"], photographs=None))


def test_a_sheet_has_its_pictures_in_rows():
    images = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]
    made = sample.sheet(images, [f"caption {i}" for i in range(6)], columns=4)
    assert made.size == (4 * sample.CELL, 2 * (sample.CELL + sample.MARGIN))
    for i in range(6):
        middle = (i % 4 * sample.CELL + 80, i // 4 * (sample.CELL + sample.MARGIN) + 80)
        assert made.getpixel(middle) == (40 * i, 0, 0)
