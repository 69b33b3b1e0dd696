"""What a recipe will do to the activations that are chosen, done to the candidates before they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone.massive_channels import as_input, beyond, mean_square
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops import postprocessing
from diffusion_backbones.ops.calibration_image import calibration_image
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.discard import AUTO, by_activation
from diffusion_backbones.spec.recipe import Level, Recipe


@dataclass(frozen=True)
class Treatment:
    """Settings of a recipe that concern every activation by itself. Called with a site and its map (B, C, h, w), it
    gives the map as a recipe with these settings would.

    Args:
        discard: ``"auto"``, or nothing.
        normalize: ``"none"``, ``"layer"`` or ``"l2"``.
        found: The candidates with the massive channels of each, once these are found.
    """

    discard: str = ""
    normalize: str = "none"
    found: Recipe | None = None

    def __post_init__(self) -> None:
        if self.discard not in ("", AUTO):
            raise ValueError(f"candidates are measured with discard='auto' or without, got {self.discard!r}")
        if self.normalize not in ("none", "layer", "l2"):
            raise ValueError(f"candidates are measured with normalize='layer', 'l2' or 'none', got {self.normalize!r}")

    @property
    def key(self) -> dict[str, str]:
        """What measurements depend on; nothing where nothing is done."""
        return {
            k: v for k, v in {"discard": self.discard, "normalize": self.normalize}.items() if v not in ("", "none")
        }

    @torch.no_grad()
    def of(self, backbone: DiffusionBackbone, ids: Sequence[str], side: int) -> Treatment:
        """The treatment of the activations of a network, with their massive channels found on the calibration image."""
        channels: dict[str, tuple[int, ...]] = {}

        def look(site: Site, act: Tensor) -> None:
            channels[site.id] = beyond(mean_square(replace(site, layout="map"), act)[0].sqrt())

        if self.discard:
            backbone.visit_activations(as_input(backbone, calibration_image(side)), ids, look)
        settings: dict[str, Any] = {"discard": channels, "normalize": self.normalize}
        return replace(self, found=Recipe("candidates", tuple(Level((name,)) for name in ids), **settings))

    def __call__(self, site: Site, act: Tensor) -> Tensor:
        """(B, C, h, w), as before."""
        if self.found is None:
            return act
        return postprocessing.apply(self.found, [replace(site, layout="map")], {site.id: act})[site.id]

    def settings(self, chosen: Sequence[str]) -> dict[str, Any]:
        """The settings of a recipe of some of the activations."""
        if self.found is None:
            return {}
        each = by_activation(self.found.discard)
        return {"discard": {name: each[name] for name in chosen if name in each}, "normalize": self.normalize}
