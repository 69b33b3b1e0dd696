"""``diffusion-backbones``: the command line."""

from diffusion_backbones.cli.program import main

__all__ = ["main"]
