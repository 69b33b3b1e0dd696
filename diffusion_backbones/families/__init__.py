"""One file per kind of network: how it is built, cut, conditioned and called. No model names here."""

from __future__ import annotations

from diffusion_backbones.families.base import Config, Configs, Family
from diffusion_backbones.families.unet import UNet

FAMILIES: dict[str, Family] = {"unet": UNet()}
"""Every family by the name that :class:`~diffusion_backbones.recipe.Checkpoint` uses."""

__all__ = ["FAMILIES", "Config", "Configs", "Family"]
