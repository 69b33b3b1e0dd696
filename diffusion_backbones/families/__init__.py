"""One file per kind of network: how it is built, cut, conditioned and called. No model names here."""

from __future__ import annotations

from diffusion_backbones.families.base import Family
from diffusion_backbones.families.transformer.auraflow import AuraFlow
from diffusion_backbones.families.transformer.dit import DiT
from diffusion_backbones.families.transformer.flux import Flux
from diffusion_backbones.families.transformer.flux2 import Flux2
from diffusion_backbones.families.transformer.hunyuan import Hunyuan
from diffusion_backbones.families.transformer.lumina import Lumina
from diffusion_backbones.families.transformer.pixart import PixArt
from diffusion_backbones.families.transformer.qwen import Qwen
from diffusion_backbones.families.transformer.sana import Sana
from diffusion_backbones.families.transformer.sd3 import SD3
from diffusion_backbones.families.transformer.z_image import ZImage
from diffusion_backbones.families.unet.deepfloyd import DeepFloyd
from diffusion_backbones.families.unet.latent import UNet
from diffusion_backbones.families.unet.pixel import PixelUNet
from diffusion_backbones.spec.configs import Config, Configs, left_out

FAMILIES: dict[str, Family] = {
    "unet": UNet(),
    "dit": DiT(),
    "pixart": PixArt(),
    "sd3": SD3(),
    "flux": Flux(),
    "hunyuan": Hunyuan(),
    "auraflow": AuraFlow(),
    "sana": Sana(),
    "qwen": Qwen(),
    "flux2": Flux2(),
    "lumina": Lumina(),
    "z_image": ZImage(),
    "pixel": PixelUNet(),
    "deepfloyd": DeepFloyd(),
}
"""Every family by the name that :class:`~diffusion_backbones.spec.checkpoint.Checkpoint` uses."""

__all__ = ["FAMILIES", "Config", "Configs", "Family", "left_out"]
