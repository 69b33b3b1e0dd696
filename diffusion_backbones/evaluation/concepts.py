"""Pictures of concepts: the photograph beside a map for each word, dark where it is not and bright where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.evaluation.visualize import Panel, seen
from diffusion_backbones.extraction import images, stages

RAMP = ((24, 18, 60), (28, 120, 130), (250, 230, 90))
"""Red, green and blue of 0, 1/2 and 1."""


@dataclass(frozen=True)
class ConceptPanel(Panel):
    """One concept in a picture; its features are (1, h, w), from 0 to 1."""

    @property
    def read(self) -> str:
        """Its kind and stride."""
        return f"attention @ stride {self.stride}"

    @staticmethod
    def colors(maps: Sequence[Tensor], hide_background: bool = False) -> list[Tensor]:  # noqa: ARG004  (a level's)
        """(1, h, w) -> (h, w, 3) uint8 each: the value on a ramp from dark blue to yellow."""
        return [_on_ramp(features[0]) for features in maps]


def _on_ramp(values: Tensor) -> Tensor:
    ramp, at = torch.tensor(RAMP, dtype=torch.float32), values * (len(RAMP) - 1)
    below = at.floor().clamp(max=len(RAMP) - 2).long()
    share = (at - below)[..., None]
    return (ramp[below] * (1 - share) + ramp[below + 1] * share).round().byte()


def panels(
    backbone: DiffusionBackbone,
    photo: Image.Image,
    words: Sequence[str],
    prompt: str | None = None,
    size: int | None = None,
) -> tuple[list[Panel], Image.Image]:
    """Find concepts in one photograph.

    Args:
        backbone: Whole, or with the layers that concepts are read from, on its device.
        photo: RGB.
        words: One panel each.
        prompt: As in :meth:`~diffusion_backbones.backbone.module.DiffusionBackbone.concepts`.
        size: Shorter side and central crop in pixels; None keeps the photograph's own size.

    Returns:
        The panels, and the photograph as the network saw it.
    """
    stages.check_fits(backbone, size or (photo.height, photo.width), 1)
    x = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)(photo)[None]
    with torch.inference_mode():
        maps = backbone.concepts(x.to(backbone.device), list(words), prompt=prompt)[0].float().cpu()
    stride = backbone.architecture.concept_stride
    found: list[Panel] = [ConceptPanel(word, each[None], stride) for word, each in zip(words, maps, strict=True)]
    return found, seen(x[0], backbone)
