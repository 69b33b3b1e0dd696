"""The levels of a fusion, as arithmetic on the maps of its members: what is concatenated, and at which stride."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from diffusion_backbones.spec.fusion import Fusion
from diffusion_backbones.spec.levels import OutMap, take

FURTHEST = 16
"""How many times a map may be finer or coarser than the stride that it is brought to; GDF's go eight times."""


class Source(NamedTuple):
    """One map of a fused level.

    Attributes:
        member: Position of the member.
        position: In the member's pyramid.
        channels: As the member gives it.
        reduced: Channels in the fusion, after the member's components are taken.
    """

    member: int
    position: int
    channels: int
    reduced: int


@dataclass(frozen=True)
class FusedLevel:
    """Maps of one common stride, concatenated along channels in this order.

    Args:
        stride: Pixels of the fusion's image per position.
        sources: Of one member behind those of the one before.
        components: What the level is reduced to at last, or None.
    """

    stride: int
    sources: tuple[Source, ...]
    components: int | None = None

    @property
    def width(self) -> int:
        """Channels before the level is reduced."""
        return sum(source.reduced for source in self.sources)

    @property
    def channels(self) -> int:
        """Channels of the map that leaves."""
        return self.components or self.width

    @property
    def members(self) -> list[int]:
        """The members that it has maps of, in order."""
        return list(dict.fromkeys(source.member for source in self.sources))

    def of(self, member: int) -> list[tuple[Source, slice]]:
        """The maps of one member, each with its channels in the level before it is reduced."""
        ends = [0, *(sum(s.reduced for s in self.sources[: i + 1]) for i in range(len(self.sources)))]
        slices = [slice(a, b) for a, b in pairwise(ends)]
        return [pair for pair in zip(self.sources, slices, strict=True) if pair[0].member == member]


def fused_levels(fusion: Fusion, pyramids: Sequence[Sequence[OutMap]]) -> tuple[FusedLevel, ...]:
    """The levels of a fusion, fine to coarse.

    Args:
        fusion: What is fused.
        pyramids: The maps that each member gives, strides in its own pixels.

    Raises:
        ValueError: The strides of the members cannot meet: a common stride is the nearest of no map, or too far from
            one; a member has no such map; or a map has too few channels to reduce.
    """
    found: list[tuple[int, Source]] = []
    strides = [_strides(fusion, i, pyramid) for i, pyramid in enumerate(pyramids)]
    common = fusion.strides or _first_whole(fusion, strides)
    for i, (member, pyramid) in enumerate(zip(fusion.members, pyramids, strict=True)):
        for index in _positions(fusion, i, len(pyramid)):
            channels, stride = pyramid[index].channels, strides[i][index]
            _check_components(member.components, channels, f"fusion {fusion.name!r}: map {index} of {member.name}")
            nearest = _nearest(fusion, i, stride, common)
            found.append((nearest, Source(i, index, channels, member.components or channels)))
    levels = []
    for at in common:
        sources = tuple(source for nearest, source in found if nearest == at)
        if not sources:
            raise ValueError(
                f"fusion {fusion.name!r}: its members cannot meet at strides {list(common)}, since no map is nearest "
                f"to {at}: {_listed(fusion, strides)}"
            )
        level = FusedLevel(at, sources, fusion.components)
        _check_components(fusion.components, level.width, f"fusion {fusion.name!r}: at {at}")
        levels.append(level)
    return tuple(levels)


def _nearest(fusion: Fusion, i: int, stride: Fraction, common: Sequence[int]) -> int:
    nearest = min(common, key=lambda s: abs(math.log2(s / stride)))
    if max(nearest / stride, stride / nearest) > FURTHEST:
        raise ValueError(
            f"fusion {fusion.name!r}: its members cannot meet at strides {list(common)}, since "
            f"{fusion.members[i].name} has a map of stride {float(stride):.4g} in pixels of the fusion's image, more "
            f"than {FURTHEST} times another than the nearest; give strides= or other input sizes"
        )
    return nearest


def _strides(fusion: Fusion, i: int, pyramid: Sequence[OutMap]) -> list[Fraction]:
    """The strides of a member in pixels of the fusion's image."""
    return [m.stride / fusion.factors[i] for m in pyramid]


def _first_whole(fusion: Fusion, strides: Sequence[Sequence[Fraction]]) -> tuple[int, ...]:
    """The strides of the first member whose maps all have whole ones, as the one with the largest input has.

    Raises:
        ValueError: That one is not read, and no other has.
    """
    read = ([of_member[i] for i in _positions(fusion, m, len(of_member))] for m, of_member in enumerate(strides))
    whole = next((r for r in read if r and all(stride.denominator == 1 for stride in r)), None)
    if whole is None:  # as where no map is read of the member with the largest input
        raise ValueError(
            f"fusion {fusion.name!r}: no member that is read has strides of whole pixels of the fusion's image: "
            f"{_listed(fusion, strides)}; give strides="
        )
    return tuple(sorted({int(stride) for stride in whole}))


def _listed(fusion: Fusion, strides: Sequence[Sequence[Fraction]]) -> str:
    texts = (", ".join(f"{float(s):.4g}" for s in of_member) for of_member in strides)
    return "; ".join(f"{m.name} has {text}" for m, text in zip(fusion.members, texts, strict=True))


def _positions(fusion: Fusion, i: int, maps: int) -> list[int]:
    member = fusion.members[i]
    if member.maps == ():
        return []
    try:
        return take(member.maps, maps)
    except ValueError as error:
        raise ValueError(f"fusion {fusion.name!r}: {member.name} has {maps} maps: {error}") from error


def _check_components(components: int | None, channels: int, what: str) -> None:
    if components and components > channels:
        raise ValueError(f"{what} has {channels} channels, and cannot be reduced to {components} components")
