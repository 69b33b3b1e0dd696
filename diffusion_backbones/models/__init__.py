"""Declarations of checkpoints and backbones, one file per upstream family. Importing this package registers them all."""

from diffusion_backbones.models import cleandift, papers, sdxl, ssd, stable_diffusion, tinysd

__all__ = ["cleandift", "papers", "sdxl", "ssd", "stable_diffusion", "tinysd"]
