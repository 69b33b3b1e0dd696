"""What several timesteps give becomes one: a mean, or a concatenation along channels. They come one after another."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from diffusion_backbones.ops.micro_batching import RunningMean
from diffusion_backbones.spec.recipe import Combination


class Combiner(Protocol):
    """Takes the activations of one timestep after another, and gives those of all."""

    def add(self, acts: dict[str, Tensor], images: int) -> None:
        """Name -> (images, ...), of the next timestep."""

    def take(self) -> dict[str, Tensor]:
        """Name -> (images, ...), of all together."""


class Concatenated:
    """Every timestep's channels behind those of the one before."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, acts: dict[str, Tensor], images: int) -> None:  # noqa: ARG002  (a mean needs it)
        """See :class:`Combiner`."""
        self._parts.append(acts)

    def take(self) -> dict[str, Tensor]:
        """See :class:`Combiner`. Channels are the second axis of maps, and the last of tokens."""
        first, *others = self._parts
        if not others:
            return first
        axis = {name: 1 if act.ndim == 4 else -1 for name, act in first.items()}
        return {name: torch.cat([part[name] for part in self._parts], axis[name]) for name in first}


def combiner(combine: Combination, timesteps: int) -> Combiner:
    """How the activations of ``timesteps`` timesteps become one, as :class:`~diffusion_backbones.Recipe` says. A mean
    is taken in float32 at least, and holds one running sum of each; one timestep stays as it is.
    """
    return Concatenated() if combine == "concatenate" else RunningMean(timesteps)
