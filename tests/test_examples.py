"""The examples, as a reader runs them: a few steps on a few scenes, in a process of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_backbones.evaluation.scenes import FOLDER, load_scenes

ROOT = Path(__file__).parents[1]
ROWS = {
    "segmenter": ["mIoU", "IoU of objects"],
    "detector": ["AP, any class", "AP, 15 classes"],
    "correspondence": ["no head", "head"],
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A set in the layout of the package's with four scenes to train on, one of each other split and four pairs."""
    folder = tmp_path_factory.mktemp("scenes")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    index = json.loads((folder / "scenes.json").read_text())
    index["splits"] = {name: captions[: 4 if name == "probe" else 1] for name, captions in index["splits"].items()}
    rows = {
        split: [i for i, row in enumerate(index["pairs"]) if row["split"] == split][:2]
        for split in ("identities", "style")
    }
    chosen = sorted(rows["identities"] + rows["style"])
    for new, old in enumerate(chosen):
        for end in ("source", "target"):
            shutil.copy(FOLDER / "pairs" / f"{old:03}-{end}.jpg", folder / "pairs" / f"{new:03}-{end}.jpg")
    index["pairs"] = [index["pairs"][i] for i in chosen]
    (folder / "scenes.json").write_text(json.dumps(index))
    assert [
        len(part) for part in (load_scenes(folder).probe, load_scenes(folder).style, load_scenes(folder).pairs)
    ] == [4, 1, 4]
    return folder


def run(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *options], env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ROWS)
def test_an_example_learns_and_writes_what_it_says(name, few, tmp_path):
    process = run(name, "--output", tmp_path / "new" / "folder", "--steps", "20", "--scenes", few)
    assert process.returncode == 0, process.stderr
    written = json.loads((tmp_path / "new" / "folder" / f"{name}.json").read_text())
    assert list(written["table"]) == [
        f"{backbone}: {row}" for backbone in ("trained", "untrained") for row in ROWS[name]
    ]
    for title, row in written["table"].items():
        printed = re.search(rf"^{re.escape(title)} +(.*)$", process.stdout, flags=re.MULTILINE)
        assert printed[1].split() == [f"{value:.1f}" for value in row.values()]
        assert all(0 <= value <= 100 for value in row.values())
    for backbone, history in written["histories"].items():
        losses = [value for _, value in history.pop("loss")]
        assert len(losses) == 20
        assert statistics.fmean(losses[-3:]) < statistics.fmean(losses[:3]), f"{backbone}: nothing was learned"
        (measured,) = history.values()
        assert measured[-1][0] <= 20
        assert len(measured) > 1
    for picture in (f"{name}.jpg", f"{name}_curves.png"):
        with Image.open(tmp_path / "new" / "folder" / picture) as image:
            assert np.asarray(image.convert("L")).std() > 10, f"{picture} is blank"


def test_an_unknown_backbone_is_told_in_one_line(tmp_path):
    process = run("segmenter", "--backbone", "tinysd_gfd", "--output", tmp_path / "none")
    assert process.returncode == 2
    assert "no backbone is called 'tinysd_gfd'. Did you mean tinysd_gdf" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "none").exists()


def test_a_budget_too_small_for_its_schedule_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from common import options

    monkeypatch.setattr(sys, "argv", ["detector.py", "--steps", "19", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        options("", steps=100)
    assert "--steps must be 20 or more, got 19" in capsys.readouterr().err


def test_pictures_show_what_lies_in_the_middle_of_the_order_by_score(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from common import median

    assert median([5.0, 1.0, 4.0, 2.0, 3.0], 3) == [3, 4, 2]
    assert median([0.0, 9.0, 0.0, 0.0, 9.0, 0.0], 2) == [3, 5]  # of equal scores the first come first
    assert median([2.0, 1.0], 4) == [1, 0]
    assert median(range(101), 1) == [50]  # the median itself


def test_a_box_is_covered_by_the_best_of_as_many_as_there_are_objects(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from detector import covered

    true = {"boxes": torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30]])}
    found = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 5.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 10.0, 10.0]])}
    assert covered(found, true) == pytest.approx((0.5 + 1) / 2)  # the third is one too many
    assert covered({"boxes": torch.zeros(0, 4)}, true) == 0
