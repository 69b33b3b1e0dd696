"""The metrics of segmentation and correspondence, in per cent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_backbones.evaluation.labels import IGNORED, points

__all__ = ["IGNORED", "class_iou", "correct_keypoints", "mean_iou", "pck"]


def class_iou(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> NDArray[np.float64]:
    """Intersection over union of every class, counted over all pixels together.

    Args:
        truth: Labels, of any shape; pixels of 255 are ignored.
        guess: Predicted labels, of the same shape.
        classes: Labels to count.

    Returns:
        (classes,) from 0 to 100; NaN for a class that is in neither.

    Raises:
        ValueError: The two have different shapes.
    """
    return 100 * _overlaps(truth, guess, classes)


def mean_iou(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> float:
    """Mean of :func:`class_iou` over the classes that occur in ``truth`` or ``guess``, from 0 to 100.

    Raises:
        ValueError: The two have different shapes, or no class occurs.
    """
    found = _overlaps(truth, guess, classes)
    if np.isnan(found).all():
        raise ValueError("none of the classes occurs in truth or guess")
    return float(100 * found[~np.isnan(found)].mean())


def _overlaps(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> NDArray[np.float64]:
    """Intersection over union of every class, from 0 to 1, or NaN."""
    truth, guess = np.asarray(truth), np.asarray(guess)
    if truth.shape != guess.shape:
        raise ValueError(f"truth and guess must have one shape, got {truth.shape} and {guess.shape}")
    counted = truth != IGNORED
    truth, guess = truth[counted], guess[counted]
    found = []
    for label in classes:
        true, guessed = np.equal(truth, label), np.equal(guess, label)
        union = np.count_nonzero(true | guessed)
        found.append(np.count_nonzero(true & guessed) / union if union else np.nan)
    return np.array(found, np.float64)


def correct_keypoints(found: ArrayLike, truth: ArrayLike, extent: float, alpha: float = 0.1) -> NDArray[np.bool_]:
    """Which points are found, as PCK counts them: within ``alpha`` times the extent of the object.

    Args:
        found, truth: (K, 2) x and y in pixels.
        extent: The longer side of the object's box in pixels.
        alpha: Share of it.

    Returns:
        (K,), True for a point that is close enough.

    Raises:
        ValueError: Points do not have that form, or the extent is no length.
    """
    a, b = points(found, "found"), points(truth, "truth")
    if len(a) != len(b):
        raise ValueError(f"found and truth must be equally many points, got {len(a)} and {len(b)}")
    if not 0 < extent < np.inf:
        raise ValueError(f"extent must be a length in pixels above 0, got {extent}")
    near: NDArray[np.bool_] = np.linalg.norm(a - b, axis=1) <= alpha * extent
    return near


def pck(correct: Sequence[NDArray[np.bool_]]) -> float:
    """Percentage of correct keypoints over all points of all pairs, from 0 to 100.

    Args:
        correct: From :func:`correct_keypoints`, one array for each pair.
    """
    return float(100 * np.concatenate(correct).mean())
