"""The metrics, on cases whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusion_backbones.evaluation import class_iou, correct_keypoints, mean_iou, pck


def test_intersection_over_union():
    truth, guess = np.array([[0, 0, 1], [1, 255, 2]]), np.array([[0, 1, 1], [1, 2, 0]])
    found = class_iou(truth, guess, range(4))
    assert found[:3] == pytest.approx([100 / 3, 200 / 3, 0])
    assert math.isnan(found[3])  # in neither
    assert mean_iou(truth, guess, range(4)) == pytest.approx(100 / 3)
    assert mean_iou(torch.from_numpy(truth), torch.from_numpy(guess), range(4)) == pytest.approx(100 / 3)
    assert mean_iou(truth == 1, truth == 1, [True]) == 100


def test_keypoints_within_a_tenth_of_the_extent():
    truth = np.array([[10.0, 10.0], [50.0, 50.0]])
    near = correct_keypoints(truth + np.array([[6.0, 8.0], [6.1, 8.0]]), truth, extent=100)
    assert near.tolist() == [True, False]
    assert correct_keypoints(truth + 15, truth, extent=100, alpha=0.5).all()
    assert pck([near, np.array([True, True])]) == 75
