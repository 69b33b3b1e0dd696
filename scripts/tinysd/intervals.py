"""What a task found, unit by unit, and the 95 % interval of its score by bootstrap over units."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

DRAWS = 1000
Figure = tuple[float, float, float]
"""Value and the ends of its 95 % interval, in per cent."""


@dataclass(frozen=True)
class Outcome:
    """What one network did on each unit: an image, a pair or a sequence.

    Attributes:
        units: (units, ...), the counts or shares that ``score`` reads.
        score: From the rows of some units to per cent.
    """

    units: np.ndarray
    score: Callable[[np.ndarray], float]


def figure(outcomes: Sequence[Outcome]) -> Figure:
    """The mean score of several networks; every draw takes the same units of all of them.

    Args:
        outcomes: Of the same units; one, or one for each seed.

    Raises:
        SystemExit: There are fewer than two units.
    """
    number = len(outcomes[0].units)
    if number < 2:
        raise SystemExit(f"an interval needs at least 2 images, pairs or sequences, got {number}")

    def value(which: np.ndarray) -> float:
        return statistics.fmean(outcome.score(outcome.units[which.astype(int)]) for outcome in outcomes)

    drawn = bootstrap(
        (np.arange(number),),
        value,
        n_resamples=DRAWS,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return value(np.arange(number)), float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def share(units: np.ndarray) -> float:
    """Per cent of what is right, of (units, 2): how many are right, and how many there are."""
    return float(100 * units[:, 0].sum() / units[:, 1].sum())


def mean_iou(units: np.ndarray) -> float:
    """Mean IoU over the classes that occur, of confusion tables (units, probes, classes, classes); the mean over
    probes.
    """
    tables = units.sum(0)
    inter = np.diagonal(tables, axis1=1, axis2=2)
    union = tables.sum(1) + tables.sum(2) - inter
    return float(np.mean([100 * (i[u > 0] / u[u > 0]).mean() for i, u in zip(inter, union, strict=True)]))
