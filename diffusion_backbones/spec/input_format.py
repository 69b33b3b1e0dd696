"""Input formats: how a framework normalizes images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from diffusion_backbones.spec.validation import check_fields, closest, convert, plain

Triple = tuple[float, float, float]


class InputFormat(NamedTuple):
    """Images as (p - mean) / std, where p in [0, 1] are the pixels.

    Attributes:
        mean, std: Mean and standard deviation of each channel, red first.
        bgr: Whether blue comes first in the tensor.
    """

    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    bgr: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputFormat:
        """Inverse of ``_asdict``; also accepts the JSON round trip.

        Raises:
            KeyError: A key is missing.
            TypeError: A key is unknown.
            ValueError: A value has another type or cannot be.
        """
        check_fields(cls, data, "input_format")
        kinds = get_type_hints(cls)
        made = cls(**{name: convert(data[name], kind, f"input_format: {name}") for name, kind in kinds.items()})
        if not all(map(math.isfinite, (*made.mean, *made.std))) or min(made.std) <= 0:
            raise ValueError(
                f"input_format: mean must be finite, and std finite and above 0; got mean={made.mean}, std={made.std}"
            )
        return made

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value that a normalized pixel can have."""
        ends = [(end - mean) / std for mean, std in zip(self.mean, self.std, strict=True) for end in (0, 1)]
        return min(ends), max(ends)


SYMMETRIC = InputFormat()
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FORMATS = {
    "symmetric": SYMMETRIC,
    "unit": InputFormat((0.0,) * 3, (1.0,) * 3),
    "uint8": InputFormat((0.0,) * 3, (1 / 255,) * 3),
    "imagenet": InputFormat(*_IMAGENET),
    "detectron2-bgr": InputFormat((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3, bgr=True),
}
"""The names that ``create_model(input_format=)`` knows: [-1, 1]; [0, 1]; 0 to 255; ImageNet's mean and standard
deviation; detectron2's default.
"""


def get_input_format(name: str | InputFormat) -> InputFormat:
    """A format by its name in :data:`FORMATS`; an :class:`InputFormat` is returned as it is.

    Raises:
        ValueError: The name is unknown, or the format has values that cannot be.
    """
    if isinstance(name, InputFormat):
        return InputFormat.from_dict({key: plain(value) for key, value in name._asdict().items()})
    if not isinstance(name, str) or name not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"input_format={name!r} is none of {known}.{closest(str(name), FORMATS)}")
    return FORMATS[name]
