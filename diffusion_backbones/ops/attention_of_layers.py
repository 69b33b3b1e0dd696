"""The attention of several layers as one map, summed in float32 at least while the layers come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.spec.activations import Site

Size = tuple[int, int]
"""Height and width."""


class Aggregated:
    """The mean over the layers of each size, enlarged to one grid by nearest neighbor, one size behind another along
    channels, in the order in which they come.

    Args:
        grid: The size of all.
    """

    def __init__(self, grid: Size):
        self._grid = grid
        self._means: dict[int, tuple[Tensor, int, Size]] = {}  # by stride, which is a number where sizes are not
        self._dtype = torch.float32

    def averages(self, size: Size) -> bool:  # noqa: ARG002  (concepts need it)
        """Whether it takes the mean over heads of a layer of this size."""
        return True

    def add(self, weights: Tensor, part: Site, size: Size) -> None:
        """(B, h · w, keys) of one layer, whose ``size`` is (h, w)."""
        self._dtype, total, layers = weights.dtype, _wide(weights), 1
        if part.stride in self._means:
            before, layers, _ = self._means[part.stride]
            total, layers = before + total, layers + 1
        self._means[part.stride] = (total, layers, size)

    def take(self) -> Tensor:
        """(B, keys of all sizes, height, width)."""
        means = [_map((total / layers).to(self._dtype), size) for total, layers, size in self._means.values()]
        return torch.cat([F.interpolate(mean, self._grid) for mean in means], 1)


class Concepts:
    """The mean over all heads of all layers, and over the tokens of each concept.

    A coarser layer is enlarged head by head, bicubically and without its undershoots, as DAAM does
    (https://arxiv.org/abs/2210.04885).

    Args:
        rows: The tokens of each concept.
        grid: The size of the maps.
    """

    def __init__(self, rows: Sequence[Sequence[int]], grid: Size):
        self._tokens, self._lengths = [i for some in rows for i in some], [len(some) for some in rows]
        self._grid = grid
        self._sum: Tensor | float = 0.0
        self._heads = 0
        self._dtype = torch.float32

    def averages(self, size: Size) -> bool:
        """Whether it takes the mean over heads of a layer of this size."""
        return size == self._grid

    def add(self, weights: Tensor, part: Site, size: Size) -> None:
        """(B, heads, h · w, keys) of one layer, whose ``size`` is (h, w), or (B, h · w, keys) averaged."""
        self._dtype, kept, heads = weights.dtype, _wide(weights[..., self._tokens]), part.channels
        if kept.ndim == 3:
            self._sum = self._sum + heads * _map(kept, size)
        else:
            fine = F.interpolate(_map(kept.flatten(0, 1), size), self._grid, mode="bicubic").clamp(min=0)
            self._sum = self._sum + fine.view(-1, heads, *fine.shape[1:]).sum(1)
        self._heads += heads

    def take(self) -> Tensor:
        """(B, concepts, height, width)."""
        assert isinstance(self._sum, Tensor), "no layer was added"
        tokens = torch.split(self._sum / self._heads, self._lengths, 1)
        return torch.stack([some.mean(1) for some in tokens], 1).to(self._dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _map(tokens: Tensor, size: Size) -> Tensor:
    """(B, h · w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)
