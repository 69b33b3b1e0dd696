"""Declarations of checkpoints and backbones, one file per upstream family. Importing this package registers them all."""

from diffusion_backbones.models import (
    auraflow,
    cleandift,
    ddpm,
    deepfloyd,
    dit,
    flux,
    flux2,
    hunyuan,
    lumina,
    papers,
    pixart,
    qwen,
    sana,
    sd3,
    sdxl,
    ssd,
    stable_diffusion,
    tiny_encoders,
    tinysd,
    z_image,
)

__all__ = [
    "auraflow", "cleandift", "ddpm", "deepfloyd", "dit", "flux", "flux2", "hunyuan", "lumina", "papers", "pixart", "qwen", "sana",
    "sd3", "sdxl", "ssd", "stable_diffusion", "tiny_encoders", "tinysd", "z_image",
]
