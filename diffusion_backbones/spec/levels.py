"""Levels of a pyramid, as arithmetic on sites: channels, strides, and which of them are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.validation import as_integer


@dataclass(frozen=True)
class LevelInfo:
    """One level of a pyramid: ``channels`` at ``stride`` pixels, read at ``sites``.

    Args:
        sites: What is read, in the order in which it is concatenated.
        timesteps: How many timesteps of each site in the denoiser are concatenated.
        components: How many principal components it is reduced to at last; None where it is not.
    """

    sites: tuple[Site, ...]
    timesteps: int = 1
    components: int | None = None

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return self.components or self.width

    @property
    def in_denoiser(self) -> bool:
        """Whether some of it is read there, so that a recipe's post-processing is done to it."""
        return any(not site.encoder for site in self.sites)

    @property
    def width(self) -> int:
        """Channels of all sites together."""
        return sum(site.channels * (1 if site.encoder else self.timesteps) for site in self.sites)

    @property
    def stride(self) -> int:
        """Pixels of the input image per position."""
        return self.sites[0].stride

    @property
    def module(self) -> str:
        """The stock modules it is read from, joined by ``+``."""
        return "+".join(site.path for site in self.sites)


def make_levels(
    levels: Sequence[Sequence[Site]], timesteps: int = 1, components: int | None = None
) -> tuple[LevelInfo, ...]:
    """Check that the sites of each level share a stride, and that levels run fine to coarse.

    Args:
        levels: Sites of each.
        timesteps: How many timesteps of each site are concatenated.
        components: How many principal components each level is reduced to; those of the image encoder alone are not.

    Raises:
        ValueError: The strides differ or do not grow; a site is an attention map, which has no channels to concatenate;
            or no site is in the denoiser.
    """
    infos = tuple(LevelInfo(tuple(sites), timesteps) for sites in levels)
    infos = tuple(replace(info, components=components) if info.in_denoiser else info for info in infos)
    for info in infos:
        for site in info.sites:
            if site.layout == "attention":
                axes = "(keys, height, width), whose keys are places," if site.parts else "(heads, queries, keys)"
                raise ValueError(
                    f"{site.id} is an attention map {axes} and cannot be a level of a pyramid; read it with "
                    "forward_activations"
                )
            if site.stride != info.stride:
                first = info.sites[0]
                raise ValueError(
                    f"one level has one stride, but {first.id} has {first.stride} and {site.id} has {site.stride}; "
                    "put them into two levels"
                )
    if all(site.encoder for info in infos for site in info.sites):
        raise ValueError(
            f"{infos[0].sites[0].id} is read in the image encoder, and no level is read in the diffusion network; add "
            "one that is"
        )
    strides = [info.stride for info in infos]
    if strides != sorted(strides):
        raise ValueError(f"levels must run fine to coarse, got strides {strides}; reorder them")
    return infos


def encoder_levels(sites: Sequence[Site], strides: Sequence[int], levels: Sequence[LevelInfo]) -> tuple[LevelInfo, ...]:
    """Levels of the image encoder for those of ``strides`` that are finer than all ``levels``: its last residual block
    there.

    Args:
        sites: All of the network.

    Raises:
        ValueError: The image encoder has none at such a stride.
    """
    found = []
    for stride in (s for s in strides if s < levels[0].stride):
        there = [site for site in sites if site.encoder and site.stride == stride and site.id.endswith("res-out")]
        if not there:
            known = sorted({site.stride for site in sites if site.encoder})
            has = known or "no readable activations (tiny encoders never do)"
            raise ValueError(f"encoder_levels=True: no map of the image encoder has stride {stride}; it has {has}")
        found.append(LevelInfo((there[-1],)))
    return tuple(found)


def group_by_stride(sites: Sequence[Site]) -> list[list[Site]]:
    """A flat choice of sites -> levels, fine to coarse, in the order given within each."""
    return [[site for site in sites if site.stride == stride] for stride in sorted({site.stride for site in sites})]


def nearest(stride: int, strides: Sequence[int]) -> int:
    """The position of the stride that is nearest by ratio; of equals the first, that is the finer or the earlier."""
    return min(range(len(strides)), key=lambda i: abs(math.log2(strides[i] / stride)))


class OutMap(NamedTuple):
    """One map that a backbone returns: its channels, its stride in pixels, and the native level it is read from."""

    channels: int
    stride: int
    level: int


def out_maps(levels: Sequence[LevelInfo], out_strides: Sequence[int] | None) -> list[OutMap]:
    """The maps of a pyramid, fine to coarse: its native levels, or for each of ``out_strides`` the nearest of them."""
    if out_strides is None:
        return [OutMap(level.channels, level.stride, i) for i, level in enumerate(levels)]
    chosen = [nearest(stride, [level.stride for level in levels]) for stride in out_strides]
    return [OutMap(levels[i].channels, stride, i) for stride, i in zip(out_strides, chosen, strict=True)]


def take(indices: int | Sequence[int] | None, n: int) -> list[int]:
    """The positions that timm's ``indices`` name among n maps, in the order given.

    Args:
        indices: None for all, an integer k for the last k, or positions, negative ones from the end.

    Raises:
        ValueError: A position is out of range or appears twice.
    """
    if indices is None:
        return list(range(n))
    if (last := as_integer(indices)) is not None:
        if not 1 <= last <= n:
            raise ValueError(f"indices={last} asks for the last {last} maps, expected 1 to {n}")
        return list(range(n - last, n))
    given = list(indices) if isinstance(indices, Iterable) else [None]
    positions = [as_integer(i) for i in given]
    wanted = [i + n if i < 0 else i for i in positions if i is not None]
    if None in positions or not wanted or any(not 0 <= i < n for i in wanted) or len(set(wanted)) < len(wanted):
        shown = given if isinstance(indices, Iterable) else indices
        raise ValueError(f"indices must be different positions from {-n} to {n - 1}, got {shown!r}")
    return wanted
