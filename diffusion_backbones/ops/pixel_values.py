"""Pixel values: from a framework's input format to the [-1, 1] of image encoders, and a warning out of range."""

from __future__ import annotations

import warnings

from torch import Tensor

from diffusion_backbones.spec.input_format import FORMATS, SYMMETRIC, InputFormat

TOLERANCE = 0.1
"""How far beyond its range resizing may take a value, as a share of the range; bicubic interpolation overshoots."""


def to_symmetric(x: Tensor, input_format: InputFormat) -> Tensor:
    """(B, 3, H, W) in a format, or uint8 where that is its range -> RGB in [-1, 1]."""
    x = x if x.is_floating_point() else x.float()
    x = x.flip(1) if input_format.bgr else x
    if input_format == SYMMETRIC:
        return x
    mean, std = (x.new_tensor(values)[:, None, None] for values in (input_format.mean, input_format.std))
    return (x * std + mean) * 2 - 1


def check_range(x: Tensor, expected: InputFormat) -> None:
    """Warn of (B, 3, H, W) values that cannot be in the expected format; Python shows the same warning once."""
    if within(x, expected):
        return
    likely = [name for name, other in FORMATS.items() if within(x, other)]
    best = min(likely, key=lambda name: _width(FORMATS[name]), default=None)
    advice = f"they look like create_model(..., input_format={best!r})" if best else "no input_format goes so far"
    low, high = expected.range()
    warnings.warn(
        f"this backbone takes images in [{low:.4g}, {high:.4g}], and values lie beyond: {advice}. Its features are "
        "wrong.",
        stacklevel=4,
    )


def _width(input_format: InputFormat) -> float:
    low, high = input_format.range()
    return high - low


def within(x: Tensor, input_format: InputFormat) -> bool:
    """Whether (B, 3, H, W) values can be in a format."""
    low, high = input_format.range()
    slack = TOLERANCE * (high - low)
    smallest, largest = (float(end) for end in x.aminmax())
    return low - slack <= smallest and largest <= high + slack
