"""What a selection gives, and how its numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion_backbones.selection.choose import Step
from diffusion_backbones.selection.measure import Measured
from diffusion_backbones.selection.reach import Reach
from diffusion_backbones.selection.rules import Rule
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Recipe


@dataclass(frozen=True)
class Selection:
    """What came of it.

    Attributes:
        arguments: What create_model takes beside the recipe.
        declaration: The network with the recipe that was chosen.
        configs: Its architecture.
        source: What the images and the task were.
        rules: The filter.
        sites: Every activation that was measured, in forward order.
        reach: What it takes to reach each.
        measured: What each is like.
        dropped: Id -> why it was not compared, "" if it was.
        scores: Id -> score alone for each split, of those that were compared.
        metric: Of the scores.
        steps: The choice, in the order in which it was made.
    """

    arguments: str
    declaration: Declaration
    configs: Configs
    source: str
    rules: tuple[Rule, ...]
    sites: tuple[Site, ...]
    reach: dict[str, Reach]
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
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
