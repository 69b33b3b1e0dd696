"""What a fusion does to images before its members, and to maps behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.ops import pyramid
from diffusion_backbones.ops.pixel_values import to_symmetric
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat

EPSILON = 1e-12
"""The least length that a vector is divided by, as in ``torch.nn.functional.normalize``."""
CHUNK = 1024
"""Positions that are compared at once with all of another image."""


def scaled(size: Sequence[int], factor: Fraction) -> tuple[int, int]:
    """Height and width of an image for a member that sees it ``factor`` times as large."""
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def reformat(x: Tensor, given: InputFormat, wanted: InputFormat) -> Tensor:
    """(B, 3, H, W) in one format -> in another; the same tensor where they are one."""
    if given == wanted:
        return x
    x = to_symmetric(x, given)
    if wanted == SYMMETRIC:
        return x
    mean, std = (x.new_tensor(values)[:, None, None] for values in (wanted.mean, wanted.std))
    x = ((x + 1) / 2 - mean) / std
    return x.flip(1) if wanted.bgr else x


def resized(x: Tensor, size: tuple[int, int], input_format: InputFormat) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size), bicubic with antialiasing as timm's transforms resize, kept in the range that
    pixels have, integers as float32; the same tensor where it has that size.
    """
    if x.shape[-2:] == size:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = F.interpolate(wide, size, mode="bicubic", antialias=True, align_corners=False)
    return wide.clamp(*input_format.range()).to(x.dtype if x.is_floating_point() else wide.dtype)


def squared_length(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 1, h, w), in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1, keepdim=True)


def scale(squared: Tensor, weight: float) -> Tensor:
    """What a map whose vectors have these squared lengths is multiplied by, so that all have the length ``weight``."""
    return weight / squared.sqrt().clamp_min(EPSILON)


def confidence(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """How clearly each member finds each position of one image in another: the greatest of its similarities to all
    positions there, less their mean, as a share of that of all members (Fuse2Match's weights).

    Args:
        queries: (B, C_i, h, w) of each member, of length 1 at every position.
        keys: (B, C_i, h', w') or (1, C_i, h', w') of each, of another image.

    Returns:
        (B, members, h, w), which sum to 1 over members.
    """
    clear = []
    for query, key in zip(queries, keys, strict=True):
        rows = query.float().flatten(2).transpose(1, 2)
        columns = key.float().flatten(2)
        found = [_contrast(part @ columns) for part in torch.split(rows, CHUNK, 1)]
        clear.append(torch.cat(found, 1))
    weights = torch.stack(clear, 1).clamp_min(EPSILON)
    weights = weights / weights.sum(1, keepdim=True)
    return weights.reshape(*weights.shape[:2], *queries[0].shape[-2:])


def _contrast(similarities: Tensor) -> Tensor:
    return similarities.amax(-1) - similarities.mean(-1)


class Assembly:
    """One map that is filled with the maps of one member after another. It holds the whole and one of them; where there
    are gradients, all of them and the whole.

    Args:
        width: Channels of the whole.
        size: Height and width.
        device, dtype: Of the whole.
    """

    def __init__(self, width: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        self.width, self.size, self.device, self.dtype = width, size, device, dtype
        self._whole: Tensor | None = None
        self._parts: list[Tensor] = []
        self._end = 0

    def add(self, maps: Iterable[Tensor], normalize: bool, weight: float) -> None:
        """The maps of the next member, (B, C_i, h_i, w_i), at once.

        Args:
            maps: One by one.
            normalize: Whether vectors over all of their channels get the length 1.
            weight: What they are multiplied by then.
        """
        begin, squared = self._end, None
        parts: list[Tensor] = []
        for given in maps:
            x = pyramid.at_size(given.to(self.device), self.size).to(self.dtype)
            if normalize:
                squared = squared_length(x) if squared is None else squared + squared_length(x)
            end = self._end + x.shape[1]
            if x.requires_grad or self._parts or parts:
                if not parts and not self._parts and self._end > begin:  # what the member gave so far has no gradients
                    parts.append(self._room(0)[:, begin : self._end])
                parts.append(x)
            else:
                self._room(len(x))[:, self._end : end] = x
            self._end = end
        factor = weight if squared is None else scale(squared, weight).to(self.dtype)
        if parts:
            self._parts += [x if isinstance(factor, float) and factor == 1 else x * factor for x in parts]
        elif squared is not None or weight != 1:
            self._room(0)[:, begin : self._end] *= factor

    def take(self) -> Tensor:
        """(B, width, h, w)."""
        if not self._parts:
            return self._room(0)
        before = [] if self._whole is None else [self._whole[:, : self.width - sum(x.shape[1] for x in self._parts)]]
        return torch.cat([*before, *self._parts], 1)

    def _room(self, batch: int) -> Tensor:
        if self._whole is None:
            self._whole = torch.empty(batch, self.width, *self.size, device=self.device, dtype=self.dtype)
        return self._whole
