"""Activations -> maps -> levels -> the strides a decoder wants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.levels import LevelInfo


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


def resample(x: Tensor, stride: int, to: int, size: tuple[int, int]) -> Tensor:
    """Bring a map to another stride without parameters: bilinear to finer, area average to coarser.

    Returns:
        (B, C, ceil(H / to), ceil(W / to)) of an image of ``size`` (H, W).
    """
    h, w = (-(-s // to) for s in size)
    return x if to == stride else _finer(x, (h, w)) if to < stride else _coarser(x, (h, w))


def at_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a map to another size as :func:`resample` does, height and width each by itself.

    Returns:
        (B, C, *size); the same tensor where it has that size.
    """
    h, w = (min(sides) for sides in zip(x.shape[-2:], size, strict=True))
    x = x if x.shape[-2:] == (h, w) else _coarser(x, (h, w))
    return x if size == (h, w) else _finer(x, size)


def _finer(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _coarser(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(x, size)
