"""Choose a few activations that are good together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffusion_backbones.spec.activations import Site

PER_STRIDE = 4
"""Number of activations of one stride, the best by themselves, that are tried together."""

Score = Callable[[Sequence[str]], NDArray[np.float64]]
"""Ids -> one score of all of them together for each split."""


@dataclass(frozen=True)
class Budget:
    """The most that a choice may cost.

    Args:
        channels: Most channels of all activations together, or None for any number.
        gflops: Most GFLOPs of the denoiser up to the last activation, or None for any number.
        max_activations: Most activations.
        costs: Id -> GFLOPs of the denoiser up to that activation.
    """

    channels: int | None = None
    gflops: float | None = None
    max_activations: int = 6
    costs: Mapping[str, float] = field(default_factory=dict)

    def cost(self, choice: Sequence[Site]) -> float:
        """GFLOPs of the denoiser up to the last activation of a choice."""
        return max(self.costs[site.id] for site in choice)

    def fits(self, choice: Sequence[Site]) -> bool:
        """Whether a choice is within the budget."""
        within = self.channels is None or sum(site.channels for site in choice) <= self.channels
        return within and (self.gflops is None or self.cost(choice) <= self.gflops)

    def affordable(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that fit the budget by themselves.

        Raises:
            ValueError: None does.
        """
        found = [site for site in sites if self.fits([site])]
        if not found:
            least = f"the narrowest has {min(site.channels for site in sites)} channels"
            if self.gflops is not None:
                least += f", the cheapest costs {min(self.cost([site]) for site in sites):.3g} GFLOPs"
            raise ValueError(f"no activation fits the budget; of {len(sites)} {least}")
        return found


@dataclass(frozen=True)
class Step:
    """One activation that was chosen.

    Attributes:
        id: Its id.
        score: Score of all activations chosen so far, mean over splits.
        gain: How much this one raised the score.
        error: Standard error of the gain over splits.
    """

    id: str
    score: float
    gain: float
    error: float


def choose(
    sites: Sequence[Site], single_scores: Mapping[str, NDArray[np.float64]], score: Score, budget: Budget | None = None
) -> list[Step]:
    """Choose greedily: the best single activation, then repeatedly the one that raises the joint score most.

    It ends when nothing fits the budget, or when the best gain is not above its own standard error over the splits.

    Args:
        sites: The candidates; of every stride the :data:`PER_STRIDE` best by themselves are tried.
        single_scores: Id -> score of each by itself, for each split.
        score: Scores several together.
        budget: The most that a choice may cost.

    Raises:
        ValueError: Nothing fits the budget.
    """
    budget = budget or Budget()
    ranked = sorted(budget.affordable(sites), key=lambda site: -float(single_scores[site.id].mean()))
    tried = [
        site for stride in {s.stride for s in ranked} for site in [s for s in ranked if s.stride == stride][:PER_STRIDE]
    ]
    taken: list[Site] = []
    steps: list[Step] = []
    before = np.zeros(len(next(iter(single_scores.values()))))
    while len(taken) < budget.max_activations:
        options = {
            site: score([s.id for s in (*taken, site)]) if taken else single_scores[site.id]
            for site in tried
            if site not in taken and budget.fits([*taken, site])
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
