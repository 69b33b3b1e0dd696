"""One file per family of networks: how it is built, cut, conditioned and called. No checkpoint's name is known here."""

from __future__ import annotations

from diffusion_backbones.families.base import Architecture
from diffusion_backbones.families.transformer.auraflow import AuraFlow
from diffusion_backbones.families.transformer.chroma import Chroma
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
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Configs, package_configs
from diffusion_backbones.spec.validation import closest


class _Families(dict[str, type[Architecture]]):
    """Name -> family; a name that is none says so."""

    def __missing__(self, name: str) -> type[Architecture]:
        raise ValueError(f"there is no family {name!r}.{closest(name, self)} Known are {', '.join(self)}.")


FAMILIES: dict[str, type[Architecture]] = _Families(
    {
        "unet": UNet,
        "dit": DiT,
        "pixart": PixArt,
        "sd3": SD3,
        "flux": Flux,
        "hunyuan": Hunyuan,
        "auraflow": AuraFlow,
        "sana": Sana,
        "qwen": Qwen,
        "flux2": Flux2,
        "lumina": Lumina,
        "z_image": ZImage,
        "chroma": Chroma,
        "pixel": PixelUNet,
        "deepfloyd": DeepFloyd,
    }
)
"""Every family by the name that :class:`~diffusion_backbones.spec.checkpoint.Checkpoint` uses. Any other name raises
``ValueError``, which names the closest.
"""


def architecture(checkpoint: Checkpoint, configs: Configs | None = None) -> Architecture:
    """A checkpoint's family bound to configs, by default those of the package; raises as :data:`FAMILIES` does."""
    return FAMILIES[checkpoint.family](configs or package_configs(checkpoint), checkpoint.name)


def family_name(network: Architecture) -> str:
    """The name of an architecture's family in :data:`FAMILIES`."""
    return next(name for name, family in FAMILIES.items() if family is type(network))


__all__ = ["FAMILIES", "Architecture", "architecture", "family_name"]
