"""The image on which a network is looked at when nobody gives one: a formula, and so the same everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OCTAVES = 6
TURN = math.pi * (3 - math.sqrt(5))
"""The golden angle: directions and phases that never fall together."""


def calibration_image(side: int) -> Tensor:
    """Waves of 1, 2, 4 ... 32 periods a side, each octave half as strong as the one before, as in photographs, and of
    every octave each color in another direction.

    Returns:
        (1, 3, side, side) float32, with its largest value 1 or -1.
    """
    at = torch.arange(side, dtype=torch.float64, device="cpu") / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    colors = torch.zeros(3, side, side, dtype=torch.float64, device="cpu")
    for i in range(3 * OCTAVES):
        octave, color = divmod(i, 3)
        along = x * math.cos(i * TURN) + y * math.sin(i * TURN)
        colors[color] += torch.sin(2 * math.pi * 2**octave * along + i * TURN) / 2**octave
    return (colors / colors.abs().amax()).float()[None]
