"""Intervals of the yardstick, and how its tasks count."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import intervals
import photo_tasks


def test_the_interval_of_a_share_is_that_of_the_normal_distribution():
    right = np.arange(400) < 100
    outcome = intervals.Outcome(np.stack([right, np.ones(400)], 1).astype(int), intervals.share)
    value, low, high = intervals.figure([outcome])
    assert value == 25
    deviation = 100 * (0.25 * 0.75 / 400) ** 0.5
    assert low == pytest.approx(25 - 1.96 * deviation, abs=0.6)
    assert high == pytest.approx(25 + 1.96 * deviation, abs=0.6)


def test_several_networks_give_their_mean_and_every_draw_takes_the_same_units_of_them():
    """Of two networks, one of which is right where the other is wrong, the mean is always a half."""
    right = np.arange(60) % 3 == 0
    outcomes = [
        intervals.Outcome(np.stack([some, np.ones(60)], 1).astype(int), intervals.share) for some in (right, ~right)
    ]
    assert intervals.figure(outcomes) == (50, 50, 50)


def test_an_interval_needs_two_units():
    with pytest.raises(SystemExit, match=r"at least 2 images, pairs or sequences, got 1"):
        intervals.figure([intervals.Outcome(np.ones((1, 2)), intervals.share)])


def test_confusion_tables_give_the_mean_iou():
    tables = np.zeros((2, 2, 3, 3), int)  # two images, two probes
    tables[0, 0, 0, 0], tables[0, 0, 0, 1], tables[1, 0, 1, 1], tables[1, 0, 2, 0] = 2, 1, 2, 1
    tables[:, 1, 0, 0] = 5  # the second probe makes no mistake
    assert intervals.mean_iou(tables) == pytest.approx((100 * np.mean([2 / 4, 2 / 3, 0]) + 100) / 2)
    truth, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    assert photo_tasks.confusion(truth, guess, 3).tolist() == tables[:, 0].sum(0).tolist()
