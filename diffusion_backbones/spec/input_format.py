"""Input at the door: what a framework makes of pixels, and back to the [-1, 1] that image encoders were trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[float, float, float]


class InputFormat(NamedTuple):
    """Images as (p - mean) / std, where p in [0, 1] are the pixels.

    Attributes:
        mean, std: Of each channel, red first.
        bgr: Whether blue comes first in the tensor.
    """

    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    bgr: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputFormat:
        """What ``_asdict`` gives, also after a way through JSON."""
        mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
        return cls(mean, std, bool(data["bgr"]))  # type: ignore[arg-type]

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value that a pixel can have."""
        ends = [(end - mean) / std for mean, std in zip(self.mean, self.std, strict=True) for end in (0, 1)]
        return min(ends), max(ends)

    def to_symmetric(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in this format, or uint8 where that is its range -> RGB in [-1, 1]."""
        x = x if x.is_floating_point() else x.float()
        x = x.flip(1) if self.bgr else x
        if self == SYMMETRIC:
            return x
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x * std + mean) * 2 - 1


SYMMETRIC = InputFormat()
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FORMATS = {
    "symmetric": SYMMETRIC,
    "unit": InputFormat((0.0,) * 3, (1.0,) * 3),
    "uint8": InputFormat((0.0,) * 3, (1 / 255,) * 3),
    "imagenet": InputFormat(*_IMAGENET),
    "detectron2-bgr": InputFormat((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3, bgr=True),
}
"""What ``create_model(input_format=)`` takes: [-1, 1]; [0, 1]; 0 to 255; ImageNet's mean and deviation; detectron2's
default.
"""

TOLERANCE = 0.1
"""How far beyond its range resizing may take a value, as a share of the range; bicubic interpolation overshoots."""


def get_input_format(name: str | InputFormat) -> InputFormat:
    """A format by its name; one that is none of :data:`FORMATS` is given as it is.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(name, InputFormat):
        return name
    if name not in FORMATS:
        raise ValueError(f"input_format={name!r} is none of {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


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


def _width(format: InputFormat) -> float:
    low, high = format.range()
    return high - low


def within(x: Tensor, format: InputFormat) -> bool:
    """Whether (B, 3, H, W) values can be in a format."""
    low, high = format.range()
    slack = TOLERANCE * (high - low)
    smallest, largest = (float(end) for end in x.aminmax())
    return low - slack <= smallest and largest <= high + slack
