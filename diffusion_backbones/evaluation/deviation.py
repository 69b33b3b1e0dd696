"""How far the features of one backbone deviate from those of another with the same shapes, such as one with a tiny
encoder, on the same images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.evaluation import csv_table


@dataclass(frozen=True)
class Deviation:
    """Deviation of one map: the latents or one pyramid level.

    Args:
        level: ``latents``, or the position of the level, 0 being the finest.
        channels, stride: Shape of the map.
        error: Norm of the difference as a share of the norm of the exact map, over all images: 0 is equal.
        cosine: Mean cosine similarity of the feature vectors at the same place: 1 is equal up to length.
    """

    level: str
    channels: int
    stride: int
    error: float
    cosine: float


COLUMNS = tuple(field.name for field in fields(Deviation))
"""Columns of the table behind those that a caller adds."""


@torch.no_grad()
def deviations(exact: DiffusionBackbone, other: DiffusionBackbone, images: Iterable[Tensor]) -> list[Deviation]:
    """Compare two backbones whose maps have the same shapes.

    Args:
        exact: The reference.
        other: The backbone that deviates.
        images: (B, 3, H, W) each, as the backbones take them; only one is in memory at a time.

    Returns:
        The latents, then every level, fine to coarse.

    Raises:
        ValueError: There are no images.
    """
    sums: list[Tensor] = []
    channels: list[int] = []
    for x in images:
        pairs = [(exact.encode(x), other.encode(x)), *zip(exact(x), other(x), strict=True)]
        channels = [a.shape[1] for a, _ in pairs]
        seen = [_sums(a.double(), b.double()) for a, b in pairs]
        sums = [total + new for total, new in zip(sums, seen, strict=True)] if sums else seen
    if not sums:
        raise ValueError("there are no images; give at least one to compare two backbones on")
    strides = [exact.latent_stride, *exact.feature_info.reduction()]
    return [
        Deviation(
            "latents" if i == 0 else str(i - 1),
            channels[i],
            strides[i],
            float((difference / norm).sqrt()),
            float(cosine / places),
        )
        for i, (difference, norm, cosine, places) in enumerate(sums)
    ]


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """(4,): squared difference, squared norm of ``a``, sum of cosines, number of places."""
    cosines = F.cosine_similarity(a, b, dim=1)
    return torch.stack(
        [(a - b).square().sum(), a.square().sum(), cosines.sum(), cosines.new_tensor(cosines.numel())]
    ).cpu()


def write(found: Sequence[Deviation], path: Path, **about: Any) -> None:
    """Write rows to a CSV, in place of those of the same backbone.

    Args:
        found: From :func:`deviations`.
        path: The CSV.
        **about: Further columns; ``backbone`` says which rows are replaced.

    Raises:
        ValueError: It is a file with other columns.
        OSError: It cannot be written.
    """
    rows = [
        {
            **about,
            **{key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in asdict(row).items()},
        }
        for row in found
    ]

    def change(before: list[csv_table.Row]) -> list[csv_table.Row]:
        kept = [row for row in before if row["backbone"] != about["backbone"]]
        return sorted([*kept, *rows], key=lambda row: str(row["backbone"]))  # stable: levels stay in order

    csv_table.update(path, list(rows[0]), change)
