"""Noisy latents a few at a time, and the mean of what was computed for them.

An ensemble of E noise draws of B images is E · B noisy latents. All of them at once are fastest on a device that is not
full; in chunks, what a call keeps does not grow with the ensemble: of every activation there is one running sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Piece = tuple[slice, list[slice]]
"""Some images, and the draws of them that are computed together, one slice after another."""


def split(ensemble: int, images: int, chunk: int | None) -> list[Piece]:
    """Every draw of every image, at most ``chunk`` of them together: several draws of all images, or one draw of some.

    Args:
        ensemble: Number of draws.
        images: Number of images.
        chunk: None for all at once.
    """
    if chunk is None:
        return [(slice(None), [slice(None)])]  # without a number: a compiled call takes any batch
    return [
        (some, list(_slices(ensemble, max(1, chunk // (some.stop - some.start))))) for some in _slices(images, chunk)
    ]


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


class RunningMean:
    """The mean over the draws of an ensemble, which come some at a time.

    Args:
        ensemble: How many there will be.
    """

    def __init__(self, ensemble: int):
        self._ensemble = ensemble
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, acts: dict[str, Tensor], images: int) -> None:
        """Name -> (draws · images, ...), draw by draw."""
        for name, act in acts.items():
            self._dtypes[name] = act.dtype
            if self._ensemble > 1:  # in float32 at least, as torch takes the mean of half precision
                act = act.view(-1, images, *act.shape[1:]).sum(0, dtype=torch.promote_types(act.dtype, torch.float32))
            self._sums[name] = self._sums[name] + act if name in self._sums else act

    def take(self) -> dict[str, Tensor]:
        """Name -> (images, ...), in the dtypes that were given."""
        if self._ensemble == 1:
            return self._sums
        return {name: (total / self._ensemble).to(self._dtypes[name]) for name, total in self._sums.items()}


def cat(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> (images, ...), from the same for some images each."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
