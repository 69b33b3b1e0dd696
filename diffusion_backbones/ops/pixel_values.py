"""Pixel values: from a framework's input format to the [-1, 1] of image encoders, and a warning out of range."""

from __future__ import annotations

import warnings

from torch import Tensor

from diffusion_backbones.spec.input_format import FORMATS, SYMMETRIC, InputFormat

UNIT = FORMATS["unit"]
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


DARK, BRIGHT = 0.1, 0.6
"""Of an image in [0, 1] that is no constant: it has a value up to the one and a value from the other up."""


def check_range(smallest: float, largest: float, expected: InputFormat, floating: bool = True) -> None:
    """Warn of images whose values cannot be in the expected format, or look as if they were in [0, 1]; Python shows the
    same warning once.

    Args:
        smallest, largest: Of a batch.
        expected: What the backbone takes.
        floating: Whether it is of floating point.
    """
    low, high = expected.range()
    takes = f"this backbone takes images in [{low:.4g}, {high:.4g}]"
    if not _can_be(smallest, largest, expected):
        likely = [name for name, other in FORMATS.items() if _can_be(smallest, largest, other)]
        best = min(likely, key=lambda name: _width(FORMATS[name]), default=None)
        advice = f"they look like create_model(..., input_format={best!r})" if best else "no input_format goes so far"
        warnings.warn(f"{takes}, and values lie beyond: {advice}. Its features are wrong.", stacklevel=4)
    elif floating and expected.range() != UNIT.range() and _looks_like_unit(smallest, largest):
        warnings.warn(
            f"{takes}, and none of these is below 0 or above 1: they look like create_model(..., input_format='unit')."
            " If they were not brought to that range, its features are wrong.",
            stacklevel=4,
        )


def _looks_like_unit(smallest: float, largest: float) -> bool:
    """Whether a batch has a dark end near 0, a bright one below 1, and nothing beyond. In [-1, 1] that would be images
    without a single value darker than mid-grey.
    """
    return 0 <= smallest <= DARK and BRIGHT <= largest <= 1


def _width(input_format: InputFormat) -> float:
    low, high = input_format.range()
    return high - low


def within(x: Tensor, input_format: InputFormat) -> bool:
    """Whether (B, 3, H, W) values can be in a format."""
    smallest, largest = (float(end) for end in x.aminmax())
    return _can_be(smallest, largest, input_format)


def _can_be(smallest: float, largest: float, input_format: InputFormat) -> bool:
    low, high = input_format.range()
    slack = TOLERANCE * (high - low)
    return low - slack <= smallest and largest <= high + slack
