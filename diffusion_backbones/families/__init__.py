"""One file per kind of network: how it is built, cut, conditioned and called. No model names here."""

from __future__ import annotations

from diffusion_backbones.component_configs import Config, Configs, left_out
from diffusion_backbones.families.auraflow import AuraFlow
from diffusion_backbones.families.base import Family
from diffusion_backbones.families.deepfloyd import DeepFloyd
from diffusion_backbones.families.dit import DiT
from diffusion_backbones.families.flux import Flux
from diffusion_backbones.families.flux2 import Flux2
from diffusion_backbones.families.hunyuan import Hunyuan
from diffusion_backbones.families.lumina import Lumina
from diffusion_backbones.families.pixart import PixArt
from diffusion_backbones.families.pixel import PixelUNet
from diffusion_backbones.families.qwen import Qwen
from diffusion_backbones.families.sana import Sana
from diffusion_backbones.families.sd3 import SD3
from diffusion_backbones.families.unet import UNet
from diffusion_backbones.families.z_image import ZImage

FAMILIES: dict[str, Family] = {
    "unet": UNet(), "dit": DiT(), "pixart": PixArt(), "sd3": SD3(), "flux": Flux(), "hunyuan": Hunyuan(), "auraflow": AuraFlow(),
    "sana": Sana(), "qwen": Qwen(), "flux2": Flux2(), "lumina": Lumina(), "z_image": ZImage(),
    "pixel": PixelUNet(), "deepfloyd": DeepFloyd(),
}
"""Every family by the name that :class:`~diffusion_backbones.recipe.Checkpoint` uses."""

__all__ = ["FAMILIES", "Config", "Configs", "Family", "left_out"]
