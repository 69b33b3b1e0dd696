"""Which channels of its activations a recipe sets to zero: the same of all, some of each, or those that are massive.

A few channels of a diffusion transformer's residual stream are far larger than all others at every place, whatever the
image, and hold little of it; Gan et al. (DiTF, https://arxiv.org/abs/2505.18584) set them to zero. Their code names the
channels of one network. Where nobody has, ``"auto"`` finds them: those whose root mean square over places is more than
:data:`MASSIVE` times that of the median channel, on one calibration image that is always the same
(:mod:`diffusion_backbones.ops.calibration_image`). What is found takes the place of the word, by activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from diffusion_backbones.spec.validation import convert

AUTO: Final = "auto"
MASSIVE = 10.0
"""Root mean square of a massive channel over that of the median one. The sources name channels and state no number, so
this one is the package's own."""
Channel = Annotated[int, Meta(ge=0)]
ByActivation = tuple[tuple[str, tuple[Channel, ...]], ...]
Discard = tuple[Channel, ...] | ByActivation | Literal["auto"]


def parse(given: Any, what: str) -> Discard:
    """The setting as it is given: channels, a mapping of activation ids to channels, or ``"auto"``.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(given, str):
        if given != AUTO:
            raise ValueError(
                f"{what}: discard must be channels, channels of each activation id, or {AUTO!r}, got {given!r}"
            )
        return AUTO
    if isinstance(given, Mapping) or (isinstance(given, tuple) and given and all(map(_is_pair, given))):
        return tuple((name, _channels(some, f"{what}: discard[{name!r}]")) for name, some in dict(given).items())
    return _channels(given, f"{what}: discard")


def _is_pair(item: Any) -> bool:
    """Whether this is one of :data:`ByActivation`, as a parsed setting is kept."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _channels(given: Any, what: str) -> tuple[int, ...]:
    channels: tuple[int, ...] = convert(given, tuple[Channel, ...], what)
    return channels


def by_activation(discard: Discard) -> dict[str, tuple[int, ...]]:
    """The channels of each activation that is named, and of none where all have the same."""
    return {item[0]: item[1] for item in discard if isinstance(item, tuple)}


def channels_of(discard: Discard, activation_id: str) -> tuple[int, ...]:
    """The channels of an activation that are set to zero, as far as they are known."""
    return by_activation(discard).get(activation_id, tuple([item for item in discard if isinstance(item, int)]))


def as_data(discard: Discard) -> Any:
    """JSON-able form that :func:`parse` reads back."""
    if isinstance(discard, str):
        return discard
    named = by_activation(discard)
    return {name: list(channels) for name, channels in named.items()} if named else list(discard)
