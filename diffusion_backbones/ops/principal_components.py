"""Principal components of channels: fitted on the positions of many maps, which are never all in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Moments:
    """Count, mean and covariance of the channels of maps that come one after another, in float64."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)
        self.shift: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """The positions of (B, C, h, w)."""
        rows = x.detach().cpu().double().movedim(1, -1).flatten(0, -2)
        if self.shift is None:
            self.shift = rows.mean(0)  # near the mean of all, so that products keep their digits
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    def components(self, n: int) -> tuple[Tensor, Tensor]:
        """The mean (C,) and the first ``n`` axes (n, C), of length 1, each with its largest entry positive, in float32.

        Raises:
            ValueError: There are fewer than ``n`` + 1 positions, or they do not differ in ``n`` directions.
        """
        if self.shift is None or self.count <= n:
            raise ValueError(f"{n} principal components need at least {n + 1} positions, got {self.count}")
        mean = self.sum / self.count
        covariance = self.products / self.count - mean.outer(mean)
        energy, axes = torch.linalg.eigh(covariance)
        rank = int((energy > energy[-1].clamp_min(0) * 1e-12).sum())
        if rank < n:
            raise ValueError(f"{n} principal components need as many directions in which positions differ, got {rank}")
        axes = axes.flip(1).T[:n]
        largest = axes.abs().argmax(1, keepdim=True)
        return (mean + self.shift).float(), (axes * axes.gather(1, largest).sign()).float()


class PrincipalComponents(nn.Module):
    """Projects (B, C, h, w) on principal components, (B, n, h, w), once these are fitted.

    Args:
        channels, components: C and n.
        what: Names the map in errors.
    """

    mean: Tensor
    axes: Tensor
    fitted: Tensor
    advice = "fit on more or on larger images"
    _known = False
    """Whether they were seen to be fitted, so that the device is not asked in every call."""

    def __init__(self, channels: int, components: int, what: str):
        super().__init__()
        self.what = what
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("axes", torch.zeros(components, channels))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @property
    def is_fitted(self) -> bool:
        """Whether there are components; on ``meta`` nobody asks."""
        if not self._known and not self.fitted.is_meta:
            self._known = bool(self.fitted)
        return self._known or self.fitted.is_meta

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrincipalComponents:
        """Moves of the module move them; they stay in float32, in which they were fitted."""
        whole = {"mean": self.mean, "axes": self.axes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in whole.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self

    def fit(self, moments: Moments) -> None:
        """Take the components of what was seen; ``ValueError`` as for :meth:`solve`."""
        self.take(*self.solve(moments))

    def solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """The mean and the axes of what was seen.

        Raises:
            ValueError: It was too little.
        """
        try:
            return moments.components(len(self.axes))
        except ValueError as error:
            raise ValueError(f"{self.what}: {error}; {self.advice}") from error

    def take(self, mean: Tensor, axes: Tensor) -> None:
        """Project on these from now on."""
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, n, h, w), in the dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, self.mean.dtype)
        centred = x.to(dtype) - self.mean[:, None, None].to(dtype)
        return torch.einsum("nc,bchw->bnhw", self.axes.to(dtype), centred).to(x.dtype)
