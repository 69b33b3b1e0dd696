"""DAVIS in the yardstick: propagated masks and their score."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.spatial.distance import cdist

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import photo_features
import propagation

COLOR, POSITION = (photo_features.features(name, 0) for name in ("color", "position"))


def test_masks_are_propagated_as_a_loop_would():
    torch.manual_seed(0)
    frames = [F.normalize(torch.randn(6, 10, 8), dim=0) for _ in range(10)]
    first = torch.rand(10, 8)
    masks = [first.numpy()]
    for t in range(1, len(frames)):
        mask = np.zeros((10, 8))
        known = [0, *range(max(1, t - 7), t)]
        for y in range(10):
            for x in range(8):
                candidates = []
                for k in known:
                    for v in range(max(0, y - 2), min(10, y + 3)):  # 12 of 60 rows are 2 of 10
                        for u in range(max(0, x - 2), min(8, x + 3)):
                            similar = float(frames[t][:, y, x] @ frames[k][:, v, u])
                            candidates.append((similar, masks[k][v, u]))
                best = sorted(candidates, reverse=True)[:5]
                weights = np.exp(np.array([similar for similar, _ in best]) / 0.1)
                mask[y, x] = (weights * [value for _, value in best]).sum() / weights.sum()
        masks.append(mask)
    found = torch.stack(list(propagation.propagate(frames, first)))
    np.testing.assert_allclose(found.numpy(), np.stack(masks[1:]), atol=1e-4)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, 9), (6, 6), (40, 40)])
def test_outlines_agree_as_their_distances_say(shift):
    a, b = np.zeros((2, 120, 160), bool)
    a[30:60, 40:90] = True
    a[10:20, 120:150] = True
    b[30 + shift[0] : 60 + shift[0], 40 + shift[1] : 90 + shift[1]] = True

    def outline(mask):
        found = []
        for y in range(120):
            for x in range(160):
                others = [mask[min(y + v, 119), min(x + u, 159)] for v, u in ((0, 1), (1, 0), (1, 1))]
                if any(other != mask[y, x] for other in others):
                    found.append((y, x))
        return np.array(found)

    distance = cdist(outline(a), outline(b))
    limit = np.ceil(0.008 * 200)  # 120 x 160 has a diagonal of 200
    precision, recall = (distance.min(0) <= limit).mean(), (distance.min(1) <= limit).mean()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert propagation.outlines_agree(a, b) == pytest.approx(expected)
    inside = (a & b).sum()
    assert propagation.overlap(a, b) == pytest.approx(inside / (1500 + 300 + 1500 - inside))


def test_empty_masks():
    empty, full = np.zeros((9, 9), bool), np.pad(np.ones((3, 3), bool), 3)
    assert propagation.overlap(empty, empty) == propagation.outlines_agree(empty, empty) == 1
    assert propagation.overlap(empty, full) == propagation.outlines_agree(empty, full) == 0


def test_a_mask_follows_its_object_where_features_do(tmp_path):
    """A red square wanders over noise: its color carries the mask along, and position leaves it behind."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 90, (36, 64, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for name in ("one", "two"):
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / "davis16" / kind / "144p" / name).mkdir(parents=True)
        for t in range(8):
            image, mask = Image.fromarray(noise), Image.new("L", (256, 144))
            box = (40 + 12 * t, 50, 40 + 12 * t + 48, 98)
            ImageDraw.Draw(image).rectangle(box, fill=(230, 40, 40))
            ImageDraw.Draw(mask).rectangle(box, fill=255)
            image.save(tmp_path / "davis16/JPEGImages/144p" / name / f"{t:05}.jpg", quality=95)
            mask.save(tmp_path / "davis16/Annotations/144p" / name / f"{t:05}.png")
    raw = photo_features.Features("raw", COLOR.dense, lambda x: F.normalize(COLOR.dense(x)[:, :3], dim=1), COLOR.pooled)
    found = {f.name: propagation.davis(tmp_path, f) for f in (raw, POSITION)}
    assert found["raw"]["DAVIS J"].units.shape == (2,)
    assert found["raw"]["DAVIS J"].units.min() > 80
    staying = [max(0, 49 - 12 * t) / (49 + 12 * t) for t in range(1, 7)]  # what the first mask overlaps with each
    assert found["position"]["DAVIS J"].units == pytest.approx(100 * np.mean(staying), abs=6)
    parts = found["raw"]
    np.testing.assert_allclose(parts["DAVIS J&F"].units, (parts["DAVIS J"].units + parts["DAVIS F"].units) / 2)
