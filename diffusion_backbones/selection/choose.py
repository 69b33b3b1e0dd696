"""Choose a few activations that are good together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion_backbones.spec.activations import Site

PER_STRIDE = 4
"""Activations of one stride, the best alone, that are tried together."""

Score = Callable[[Sequence[str]], NDArray[np.float64]]
"""Ids -> one score of all of them together for each split."""


@dataclass(frozen=True)
class Step:
    """One activation that was taken.

    Attributes:
        id: Which.
        score: Of everything that was taken so far, mean over splits.
        gain: By how much this one raised it.
        error: Standard error of the gain over splits.
    """

    id: str
    score: float
    gain: float
    error: float


def affordable(
    sites: Sequence[Site],
    channels: int | None = None,
    cost: Callable[[Sequence[Site]], float] | None = None,
    budget: float | None = None,
) -> list[Site]:
    """Those that fit the budget by themselves. Arguments as for :func:`choose`.

    Raises:
        ValueError: None does.
    """
    found = [
        site
        for site in sites
        if (channels is None or site.channels <= channels)
        and (cost is None or budget is None or cost([site]) <= budget)
    ]
    if not found:
        least = f"the narrowest has {min(site.channels for site in sites)} channels"
        least += (
            f", the cheapest costs {min(cost([site]) for site in sites):.3g}" if cost and budget is not None else ""
        )
        raise ValueError(f"no activation fits the budget; of {len(sites)} {least}")
    return found


def choose(
    sites: Sequence[Site],
    alone: Mapping[str, NDArray[np.float64]],
    score: Score,
    *,
    channels: int | None = None,
    cost: Callable[[Sequence[Site]], float] | None = None,
    budget: float | None = None,
    members: int = 6,
) -> list[Step]:
    """Greedy choice: the best single activation, then again and again the one that raises the score of all most.

    It ends when nothing fits the budget, or when the best gain is not above its own standard error over the splits.

    Args:
        sites: What there is to choose from; of every stride the :data:`PER_STRIDE` best alone are tried.
        alone: Score of each by itself, for each split.
        score: Of several together.
        channels: Channels of all together, at most.
        cost, budget: What a choice costs, such as GFLOPs of the network up to its last activation, and the most that it
            may.
        members: How many are taken at most.

    Raises:
        ValueError: Nothing fits the budget.
    """
    ranked = sorted(affordable(sites, channels, cost, budget), key=lambda site: -float(alone[site.id].mean()))
    tried = [
        site for stride in {s.stride for s in ranked} for site in [s for s in ranked if s.stride == stride][:PER_STRIDE]
    ]

    def fits(choice: Sequence[Site]) -> bool:
        within = channels is None or sum(site.channels for site in choice) <= channels
        return within and (cost is None or budget is None or cost(choice) <= budget)

    taken: list[Site] = []
    steps: list[Step] = []
    before = np.zeros(len(next(iter(alone.values()))))
    while len(taken) < members:
        options = {
            site: alone[site.id] if not taken else score([s.id for s in (*taken, site)])
            for site in tried
            if site not in taken and fits([*taken, site])
        }
        if not options:
            break
        best = max(options, key=lambda site: float(options[site].mean()))
        gains = options[best] - before
        error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else 0.0
        if taken and gains.mean() <= max(error, 0.0):
            break
        taken.append(best)
        steps.append(Step(best.id, float(options[best].mean()), float(gains.mean()), error))
        before = options[best]
    return steps
