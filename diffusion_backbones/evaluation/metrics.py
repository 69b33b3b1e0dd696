"""The metrics of segmentation and correspondence, in per cent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_backbones.evaluation.labels import IGNORED, NUMBERS, points

__all__ = ["IGNORED", "class_iou", "correct_keypoints", "mean_iou", "pck"]


def class_iou(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> NDArray[np.float64]:
    """Intersection over union of every class, counted over all pixels together.

    Args:
        truth: Labels, integers from 0 of any shape; pixels of 255 are ignored.
        guess: Predicted labels, of the same shape.
        classes: Labels to count, such as ``range(21)``.

    Returns:
        (classes,) from 0 to 100; NaN for a class that is in neither.

    Raises:
        ValueError: The two have different shapes, or are no labels.
    """
    return 100 * _overlaps(truth, guess, classes)


def mean_iou(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> float:
    """Mean of :func:`class_iou` over the classes that occur in ``truth`` or ``guess``, from 0 to 100.

    Raises:
        ValueError: The two have different shapes, or are no labels, or no class occurs.
    """
    found = _overlaps(truth, guess, classes)
    if np.isnan(found).all():
        raise ValueError("none of the classes occurs in truth or guess")
    return float(100 * found[~np.isnan(found)].mean())


def _overlaps(truth: ArrayLike, guess: ArrayLike, classes: Iterable[int]) -> NDArray[np.float64]:
    """Intersection over union of every class, from 0 to 1, or NaN."""
    truth, guess = _labels(truth, "truth"), _labels(guess, "guess")
    if not isinstance(classes, Iterable):
        raise ValueError(f"classes must be labels, such as range(21), got {classes!r}")
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


def _is_real(value: Any) -> bool:
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def _labels(values: ArrayLike, name: str) -> NDArray[Any]:
    found = np.asarray(values)
    whole = found.dtype.kind in "iub" or (found.dtype.kind == "f" and bool((found == np.rint(found)).all()))
    if not whole or (found.size and found.min() < 0):
        odd = f"values from {found.min():g}" if whole else f"{found.dtype}"
        raise ValueError(f"{name} must be labels, whole numbers from 0 and 255 for what is ignored, got {odd}")
    return found


def correct_keypoints(found: ArrayLike, truth: ArrayLike, extent: float, alpha: float = 0.1) -> NDArray[np.bool_]:
    """Which points are found, as PCK counts them: within ``alpha`` times the extent of the object.

    Args:
        found, truth: (K, 2) x and y in pixels.
        extent: The longer side of the object's box in pixels.
        alpha: Share of it, above 0 and at most 1.

    Returns:
        (K,), True for a point that is close enough.

    Raises:
        ValueError: Points do not have that form, or the extent is no length, or ``alpha`` no share.
    """
    if not _is_real(extent) or not 0 < extent < np.inf:
        raise ValueError(f"extent must be a length in pixels above 0, got {extent!r}")
    if not _is_real(alpha) or not 0 < alpha <= 1:
        raise ValueError(f"alpha must be a share of the extent, above 0 and at most 1, got {alpha!r}")
    a, b = points(found, "found"), points(truth, "truth")
    if len(a) != len(b):
        raise ValueError(f"found and truth must be equally many points, got {len(a)} and {len(b)}")
    near: NDArray[np.bool_] = np.linalg.norm(a - b, axis=1) <= alpha * extent
    return near


def pck(correct: Sequence[NDArray[np.bool_]]) -> float:
    """Percentage of correct keypoints over all points of all pairs, from 0 to 100.

    Args:
        correct: From :func:`correct_keypoints`, one array for each pair.

    Raises:
        ValueError: There is no point, or what is given are no truth values.
    """
    found = [np.asarray(points) for points in correct]
    if not sum(points.size for points in found) or any(points.dtype != bool for points in found):
        raise ValueError(f"pck takes truth values of at least one point, from correct_keypoints, got {correct!r:.80}")
    return float(100 * np.concatenate(found).mean())
