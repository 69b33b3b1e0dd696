"""How far the features of one backbone are from those of another of the same shape, such as one with a tiny encoder, on
the same images.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops import safetensors_io


@dataclass(frozen=True)
class Deviation:
    """Of the latents, or of a level.

    Args:
        level: ``latents``, or the position of the level, 0 being the finest.
        channels, stride: Of the map.
        error: Norm of the difference as a share of the norm of the exact map, all images together: 0 is equal.
        cosine: Of the feature vectors at the same place, the mean over all places: 1 is equal up to length.
    """

    level: str
    channels: int
    stride: int
    error: float
    cosine: float


@torch.no_grad()
def deviations(exact: DiffusionBackbone, other: DiffusionBackbone, images: Iterable[Tensor]) -> list[Deviation]:
    """Compare two backbones that give maps of the same shapes.

    Args:
        exact: What is compared with.
        other: What deviates.
        images: (B, 3, H, W) each, as the backbones take them; one after another is in memory.

    Returns:
        The latents, then every level, fine to coarse.

    Raises:
        ValueError: No images.
    """
    sums: list[Tensor] = []
    channels: list[int] = []
    for x in images:
        pairs = [(exact.encode(x), other.encode(x)), *zip(exact(x), other(x), strict=True)]
        channels = [a.shape[1] for a, _ in pairs]
        seen = [_sums(a.double(), b.double()) for a, b in pairs]
        sums = [total + new for total, new in zip(sums, seen, strict=True)] if sums else seen
    if not sums:
        raise ValueError("there is no image to compare on")
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
    """(4,): squared difference, squared norm of ``a``, cosines, and how many places there are."""
    cosines = F.cosine_similarity(a, b, dim=1)
    return torch.stack(
        [(a - b).square().sum(), a.square().sum(), cosines.sum(), cosines.new_tensor(cosines.numel())]
    ).cpu()


def write(found: Sequence[Deviation], path: Path, **about: Any) -> None:
    """Put rows into a CSV in the place of those that are ``about`` the same backbone."""
    rows = [
        {
            **about,
            **{key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in asdict(row).items()},
        }
        for row in found
    ]
    before = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    kept = [row for row in before if row["backbone"] != about["backbone"]]
    with safetensors_io.whole(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: str(row["backbone"])))  # stable: levels stay in order
