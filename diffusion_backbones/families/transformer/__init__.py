"""Diffusion transformers, a file each, on what they share."""

from diffusion_backbones.families.transformer.base import Transformer

__all__ = ["Transformer"]
