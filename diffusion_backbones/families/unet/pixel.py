"""Unconditional U-Nets on pixels: diffusers' ``UNet2DModel`` (DDPM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.unet.latent import UNet, plain_attention, sites
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn


class PixelUNet(UNet):
    """The family of ``UNet2DModel``. The latents are the image itself, and nothing conditions the network but the
    timestep.
    """

    encoder = ""
    networks = ("UNet2DModel",)

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config = configs["unet"]
        each: int | None = config.get("attention_head_dim", 8)  # channels of a head; None is one head
        heads = [width // each if each else 1 for width in config["block_out_channels"]]
        mid = plain_attention if config.get("add_attention", True) else _nothing
        return Catalogue(
            sites({**config, "attention_head_dim": heads, "mid_block_type": "UNetMidBlock2D"}, 1, mid), network
        )

    def latent_channels(self, configs: Configs) -> int:
        return int(configs["unet"].get("in_channels", 3))

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {}

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ()

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import UNet2DModel

        unet: nn.Module = UNet2DModel.from_config(config)
        return unet

    def call(
        self,
        denoiser: nn.Module,
        z: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Tensor],
        size: tuple[int, int],
    ) -> Tensor:
        output: Tensor = denoiser(z, timestep, return_dict=False)[0]
        return output

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Any]:
        for prompt in prompts:
            if prompt:
                raise ValueError(f"prompt={prompt!r}: this network is conditioned on nothing but the timestep")
        return {}


def _nothing(id: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    return iter(())
