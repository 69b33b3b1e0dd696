"""The result of a selection, and the format of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion_backbones.selection.choose import Step
from diffusion_backbones.selection.measure import Measured
from diffusion_backbones.selection.prefix_cost import PrefixCost
from diffusion_backbones.selection.rules import Rule
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Recipe


@dataclass(frozen=True)
class Selection:
    """The result of a selection.

    Attributes:
        arguments: The arguments of ``create_model`` beside the recipe, as code.
        declaration: The network with the recipe that was chosen.
        configs: The configs of the network's components.
        source: The images and the task, in words.
        rules: The filter.
        sites: Every activation that was measured, in forward order.
        prefix_costs: Id -> cost of the network up to it.
        measured: Properties of each.
        dropped: Id -> why the filter dropped it, or "" if it passed.
        scores: Id -> score by itself for each split, of those that were compared.
        metric: Name of the score.
        steps: The choice, in the order in which it was made.
    """

    arguments: str
    declaration: Declaration
    configs: Configs
    source: str
    rules: tuple[Rule, ...]
    sites: tuple[Site, ...]
    prefix_costs: dict[str, PrefixCost]
    measured: Measured
    dropped: dict[str, str]
    scores: dict[str, NDArray[np.float64]]
    metric: str
    steps: tuple[Step, ...]

    @property
    def recipe(self) -> Recipe:
        """The choice as a recipe."""
        return self.declaration.recipe


def number(value: float | None) -> str:
    """A number with three significant digits, or a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
