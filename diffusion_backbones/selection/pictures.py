"""Pictures of activations, as the paper's own figures show them: three principal components as colours, the same ones
for a few images.
"""

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
from diffusion_backbones.evaluation.visualize import pca_rgb
from diffusion_backbones.spec.activations import Site

SHOWN = 3
"""Images that are shown, the first ones."""
SIDE = 32
"""Places along a side of a picture, at most; finer activations are averaged."""


def strip(act: Tensor) -> Image.Image:
    """Maps of several images side by side, as many pixels as places; a colour means the same in all of them.

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
    """A strip for every activation, ``folder/ID.png``, from one run of the network. What a run with the same ``key``
    has painted stays.

    Args:
        images: (3, S, S) each, in [-1, 1].
        ids: Activation ids.
        folder: Is made if it is not there.
        key: All that the pictures depend on.
    """
    done, known = folder / "done.json", json.dumps({**key, "ids": list(ids)})
    if done.is_file() and done.read_text() == known:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    device = next(backbone.denoiser.parameters()).device

    def look(site: Site, act: Tensor) -> None:
        strip(act).save(folder / f"{site.id}.png")

    backbone.visit_activations(torch.stack(list(images)).to(device), ids, look)
    done.write_text(known)


@torch.no_grad()
def pyramid(
    backbone: DiffusionBackbone, images: Sequence[Tensor], levels: Sequence[Sequence[str]]
) -> list[Image.Image]:
    """A strip for every level, its activations concatenated along channels as a backbone with this recipe gives them.

    Args:
        images: (3, S, S) each, in [-1, 1].
        levels: Activation ids of each, of one stride.
    """
    device = next(backbone.denoiser.parameters()).device
    maps = backbone.forward_activations(
        torch.stack(list(images)).to(device), [id for level in levels for id in level], as_maps=True
    )
    return [strip(torch.cat([maps[id] for id in level], dim=1)) for level in levels]


def photograph(image: Tensor, side: int = 256) -> Image.Image:
    """(3, S, S) in [-1, 1] as a picture, at most ``side`` pixels wide."""
    pixels = image.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((side, side))
    return picture
