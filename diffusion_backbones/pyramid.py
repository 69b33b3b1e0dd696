"""Activations -> maps -> levels -> the strides a decoder wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.activations import Site


@dataclass(frozen=True)
class LevelInfo:
    """One level of a pyramid: ``channels`` at ``stride`` pixels, read at ``sites``."""

    sites: tuple[Site, ...]

    @property
    def channels(self) -> int:
        return sum(site.channels for site in self.sites)

    @property
    def stride(self) -> int:
        return self.sites[0].stride

    @property
    def module(self) -> str:
        """The stock modules it is read from, joined by ``+``."""
        return "+".join(site.path for site in self.sites)


def make_levels(levels: Sequence[Sequence[Site]]) -> tuple[LevelInfo, ...]:
    """Check that the sites of each level share a stride, and that levels run fine to coarse.

    Raises:
        ValueError: They do not; a site is an attention map, which has no channels to concatenate; or none is in the denoiser.
    """
    infos = tuple(LevelInfo(tuple(sites)) for sites in levels)
    for info in infos:
        for site in info.sites:
            if site.layout == "attention":
                raise ValueError(f"{site.id} is an attention map (heads, queries, keys) and cannot be a level of a pyramid; read it with forward_activations")
            if site.stride != info.stride:
                first = info.sites[0]
                raise ValueError(f"one level has one stride, but {first.id} has {first.stride} and {site.id} has {site.stride}; put them into two levels")
    if all(site.encoder for info in infos for site in info.sites):
        raise ValueError(f"{infos[0].sites[0].id} is read in the image encoder, and no level in the diffusion network; add one that is")
    strides = [info.stride for info in infos]
    if strides != sorted(strides):
        raise ValueError(f"levels must run fine to coarse, got strides {strides}; reorder them")
    return infos


def fine(sites: Sequence[Site], strides: Sequence[int], levels: Sequence[LevelInfo]) -> tuple[LevelInfo, ...]:
    """Levels of the image encoder for those of ``strides`` that are finer than all ``levels``: its last residual block there.

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
            said = known or "none that can be read, as a tiny encoder has not"
            raise ValueError(f"encoder_levels=True: no map of the image encoder has stride {stride}; it has {said}")
        found.append(LevelInfo((there[-1],)))
    return tuple(found)


def group_by_stride(sites: Sequence[Site]) -> list[list[Site]]:
    """A flat choice of sites -> levels, fine to coarse, in the order given within each."""
    return [[site for site in sites if site.stride == stride] for stride in sorted({site.stride for site in sites})]


def to_map(x: Tensor, site: Site, height: int, width: int) -> Tensor:
    """An activation as a map.

    Args:
        x: (B, C, h, w), or (B, h·w, C) with tokens in row-major order, as ``site.layout`` says.
        height, width: Size in pixels of the padded input; both divide by the stride.

    Returns:
        (B, C, height / stride, width / stride).
    """
    h, w = height // site.stride, width // site.stride
    if site.layout == "tokens":
        assert x.shape[1] == h * w, f"{site.id}: {x.shape[1]} tokens are not {h} x {w}"
        x = x.transpose(1, 2).reshape(x.shape[0], -1, h, w)
    assert x.shape[-2:] == (h, w), f"{site.id}: {tuple(x.shape)} is not {h} x {w}"
    return x


def assemble(level: LevelInfo, maps: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Concatenate a level's maps along channels and crop the padding off.

    Args:
        maps: Site id -> (B, C, h, w).
        size: Height and width in pixels of the image before padding.

    Returns:
        (B, level.channels, ceil(H / stride), ceil(W / stride)).
    """
    x = torch.cat([maps[site.id] for site in level.sites], dim=1) if len(level.sites) > 1 else maps[level.sites[0].id]
    h, w = (-(-s // level.stride) for s in size)
    return x[..., :h, :w].contiguous()


def nearest(stride: int, strides: Sequence[int]) -> int:
    """The position of the stride that is nearest by ratio; of equals the first, that is the finer or the earlier."""
    return min(range(len(strides)), key=lambda i: abs(math.log2(strides[i] / stride)))


def resample(x: Tensor, stride: int, to: int, size: tuple[int, int]) -> Tensor:
    """Bring a map to another stride without parameters: bilinear to finer, area average to coarser.

    Returns:
        (B, C, ceil(H / to), ceil(W / to)) of an image of ``size`` (H, W).
    """
    if to == stride:
        return x
    h, w = (-(-s // to) for s in size)
    if to < stride:
        return F.interpolate(x, (h, w), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(x, (h, w))
