"""Pictures of activations, as in the paper's figures: three principal components as colours, shared by a few images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.evaluation.principal_components import pca_rgb
from diffusion_backbones.ops import atomic
from diffusion_backbones.spec.activations import Site

SHOWN = 3
"""Number of images that are shown, the first ones."""
SIDE = 32
"""Most places along a side of a picture; finer activations are averaged."""


def strip(act: Tensor) -> Image.Image:
    """The maps of several images side by side, one pixel for each place; a colour means the same in all of them.

    Args:
        act: (N, C, h, w), finite.
    """
    side = min(SIDE, *act.shape[-2:])
    maps = F.adaptive_avg_pool2d(act.detach().float(), side)
    return Image.fromarray(pca_rgb(torch.cat(list(maps), dim=2)).numpy())


@torch.no_grad()
def paint(
    backbone: DiffusionBackbone, images: Sequence[Tensor], ids: Sequence[str], folder: Path, key: dict[str, Any]
) -> None:
    """Paint a strip for every activation, ``folder/ID.png``, in one run of the network; those of a run with the same
    ``key`` are kept.

    Args:
        backbone: Computes all ``ids``.
        images: (3, S, S) each, in [-1, 1].
        ids: Activation ids.
        folder: Made if it does not exist.
        key: All that the pictures depend on.
    """
    done, known = folder / "done.json", json.dumps({**key, "ids": list(ids)})
    if done.is_file() and done.read_text() == known:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)

    def save(site: Site, act: Tensor) -> None:
        with atomic.replacing(folder / f"{site.id}.png") as part:
            strip(act).save(part, "PNG")

    backbone.visit_activations(torch.stack(list(images)).to(backbone.device), ids, save)
    atomic.write_text(done, known)


@torch.no_grad()
def pyramid(
    backbone: DiffusionBackbone, images: Sequence[Tensor], levels: Sequence[Sequence[str]]
) -> list[Image.Image]:
    """A strip for every level, whose activations are concatenated along channels as in a backbone with this recipe.

    Args:
        backbone: Computes all the ids.
        images: (3, S, S) each, in [-1, 1].
        levels: Activation ids of each level, of one stride.
    """
    x, ids = torch.stack(list(images)).to(backbone.device), [name for level in levels for name in level]
    maps = backbone.forward_activations(x, ids, as_maps=True)
    return [strip(torch.cat([maps[name] for name in level], dim=1)) for level in levels]


def photograph(image: Tensor, side: int = 256) -> Image.Image:
    """(3, S, S) in [-1, 1] as a picture, at most ``side`` pixels wide."""
    pixels = image.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((side, side))
    return picture
