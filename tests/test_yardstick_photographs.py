"""The yardstick's tasks on photographs, on made ones with a known answer."""

from __future__ import annotations

import csv
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import photo_features
import photo_tasks
import recognized

COLOR, POSITION = (photo_features.features(name, 0) for name in ("color", "position"))


STRIPES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (11, 3)) / 127.5 - 1).float()
"""The colors of 11 classes."""


def _near_stripes(x):
    """How near the color of a place is to each of those: what a line can tell apart."""
    small = F.avg_pool2d(x, 4)
    return torch.exp(-4 * (small[:, None] - STRIPES[None, :, :, None, None]).square().sum(2))


def _striped(path: Path, labels: Path, seed: int) -> None:
    """A picture of 480 x 360 pixels in upright stripes, whose color is their class."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(11), 2))[:20].repeat(24)
    colors = ((STRIPES.numpy() + 1) * 127.5).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(colors[classes], (360, 480, 3)).astype(np.uint8)).save(path, quality=95)
    Image.fromarray(np.broadcast_to(classes, (360, 480)).astype(np.uint8)).save(labels)


def test_a_probe_of_colors_solves_what_colors_say_and_position_does_not(tmp_path):
    for split, seeds in (("train", range(3)), ("val", range(3, 5)), ("test", range(5, 8))):
        for seed in seeds:
            root = tmp_path / "camvid"
            _striped(root / split / f"{seed}.jpg", root / f"{split}annot" / f"{seed}.png", seed)
    near = photo_features.Features("near", _near_stripes, COLOR.matching, COLOR.pooled)
    by_color = photo_tasks.camvid(tmp_path, near)["CamVid mIoU"]
    assert by_color.units.shape == (3, 1, 11, 11)
    assert by_color.units.sum() == 3 * 64 * 48  # every place of every test photograph
    by_position = photo_tasks.camvid(tmp_path, POSITION)["CamVid mIoU"]
    assert by_color.score(by_color.units) > 80
    assert by_position.score(by_position.units) < 25
    with pytest.raises(SystemExit, match=r"holds no photographs"):
        photo_tasks.camvid(tmp_path / "none", COLOR)


@pytest.fixture
def photographs(tmp_path):
    """Pictures of three colors that are their classes, 60 of each, in one tar file and its index."""
    folder, rows = tmp_path / "photos192", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(180):
            base = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)][i % 3])
            file = io.BytesIO()
            noisy = (base + rng.normal(0, 25, (192, 192, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file, "webp", quality=80)
            info = tarfile.TarInfo(f"{i}.webp")
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
            name = ("apple", "leaf", "sky")[i % 3]
            rows.append(["a.tar", info.name, f"a photo of a {name}", name])
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["shard", "file", "caption", "class"], *rows, ["a.tar", "0.webp", "a photo", ""]])
    return tmp_path


def test_classes_of_photographs_that_training_never_saw(photographs):
    train, test = photo_tasks.rows(photographs / "photos192")
    assert len(train) + len(test) == 180  # what has no class is left out
    assert not {row["file"] for row in train} & {row["file"] for row in test}
    (metric, by_color) = next(iter(photo_tasks.classes(photographs, COLOR).items()))
    assert metric == "accuracy of 3 classes"
    assert len(by_color.units) == len(test)
    assert by_color.score(by_color.units) == 100
    by_position = photo_tasks.classes(photographs, POSITION)[metric]  # the same for all: one class is always named
    most = max(np.unique([row["class"] for row in test], return_counts=True)[1])
    assert by_position.score(by_position.units) <= 100 * most / len(test)
    assert photo_tasks.common([{"class": c} for c in "cabbacc"], 2) == ["c", "a"]
    assert photo_tasks.caption(test, "sky") == "a photo of a sky"


def test_a_classifier_knows_its_classes_and_is_asked_about_others_than_it_learned(photographs):
    train, _ = photo_tasks.rows(photographs / "photos192")
    some = train[:60]
    images = list(photo_tasks.pictures(photographs / "photos192", some))
    x = recognized.describe(COLOR, images)
    y = np.array([("apple", "leaf", "sky").index(row["class"]) for row in some])
    own = recognized.own_accuracy(x, x, y)
    assert own.score(own.units) == 100
    by_chance = recognized.own_accuracy(x, x, np.random.default_rng(0).permutation(y))
    assert by_chance.score(by_chance.units) < 60, "a classifier that learned by heart was asked what it had learned"
    large = [image.resize((256, 256)) for image in images[:6]]
    assert (recognized.learn(x, x, y).predict(recognized.describe(COLOR, large)) == y[:6]).all()


def test_keypoints_that_are_where_they_were(tmp_path):
    """Position finds the points that did not move, to half a place, and no others."""
    folder = tmp_path / "pf-willow" / "PF-dataset-WILLOW" / "things"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    points = rng.uniform(40, 200, (10, 2))
    moved = points.copy()
    moved[6:] += np.where(points[6:] > 120, -60, 60)
    for name, (size, found) in {
        "a": ((256, 256), points),
        "b": ((256, 256), moved),
        "c": ((512, 512), points * 2),
    }.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{name}.png")
        savemat(folder / f"{name}.mat", {"pts_coord": found.T + 0.5})
    found = photo_tasks.willow(tmp_path, POSITION)
    assert list(found) == ["PF-WILLOW PCK@0.05", "PF-WILLOW PCK@0.1", "PF-WILLOW PCK@0.15"]
    assert found["PF-WILLOW PCK@0.1"].units.tolist() == [[6, 10], [10, 10], [6, 10], [6, 10], [10, 10], [6, 10]]
