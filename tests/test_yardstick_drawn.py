"""The yardstick's tasks on drawn scenes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_backbones.evaluation.scenes import Scene, load_scenes

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import drawn_tasks
import evaluation_set
import photo_features
import sprites

POSITION = photo_features.features("position", 0)


def _few(full, **splits):
    from dataclasses import replace

    return replace(full, **splits)


def test_keypoints_of_drawn_scenes():
    full = load_scenes()
    found = drawn_tasks.keypoints(_few(full, pairs=full.pairs[29:31]), POSITION)
    for pair in full.pairs[29:31]:
        x0, y0, x1, y1 = pair.target_box
        there = np.floor(pair.source_points / 4) * 4 + 2  # the places are four pixels wide
        near = (np.linalg.norm(there - pair.target_points, axis=1) <= 0.1 * max(x1 - x0, y1 - y0)).sum()
        assert found[f"PCK@0.1, {pair.split}"].units.tolist() == [[near, len(pair.source_points)]]


@pytest.fixture(scope="module")
def drawn():
    """Sprites of two classes and two styles: discs and squares with a bright corner."""
    y, x = np.mgrid[: sprites.SIDE, : sprites.SIDE]
    disc = (np.hypot(x - 63.5, y - 63.5) < 60)[..., None] * np.array([255, 40, 40, 255])
    square = np.ones((sprites.SIDE, sprites.SIDE, 1)) * np.array([40, 40, 255, 255])
    identities = [sprites.Identity("red disc", "fruit", False), sprites.Identity("blue square", "building", False)]
    images = np.stack([disc, square, disc, square]).astype(np.uint8)
    return sprites.Sprites(images, np.array([0, 0, 4, 4]), np.array([0, 1, 0, 1]), identities)


def test_scenes_are_drawn_anew_and_always_the_same(drawn):
    assert drawn_tasks.SCENES >= 400
    first, again = drawn_tasks.draw(drawn, 3), drawn_tasks.draw(drawn, 3)
    assert [scene.caption for scene in first] == [scene.caption for scene in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert first[0].image.size == (evaluation_set.SIDE,) * 2
    assert drawn_tasks.STREAM not in {*range(len(evaluation_set.SPLITS)), *range(100, 100 + len(evaluation_set.PAIRS))}


@pytest.mark.parametrize("name", ["color", "tinysd_gdf", photo_features.SINGLE[0]])
def test_a_probe_of_drawn_scenes(name, drawn, monkeypatch):
    """Two objects of plain colors: a probe of colors finds them, and every place of every scene is counted."""
    monkeypatch.setattr(drawn_tasks, "PROBES", 2)
    some = drawn_tasks.draw(drawn, 6)
    test = drawn_tasks.draw(drawn, 8)[6:]
    data = _few(load_scenes(), scenes=tuple(test), identities=tuple(test), style=tuple(test))
    found = drawn_tasks.probe(some, data, photo_features.features(name, 0))
    assert list(found) == ["mIoU, scenes", "mIoU, identities", "mIoU, style"]
    outcome = found["mIoU, scenes"]
    assert outcome.units.shape == (2, 2, 16, 16)
    assert (outcome.units.sum((2, 3)) == 64 * 64).all()
    for scene, tables in zip(test, outcome.units, strict=True):
        counts = np.bincount(np.asarray(scene.classes)[2::4, 2::4].ravel(), minlength=16)
        assert (tables.sum(2) == counts).all()
    assert isinstance(test[0], Scene)
    if name == "color":
        assert outcome.score(outcome.units) > 50
