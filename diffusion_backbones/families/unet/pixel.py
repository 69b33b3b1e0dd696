"""Unconditional U-Nets on pixels: diffusers' ``UNet2DModel`` (DDPM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.unet.latent import UNet
from diffusion_backbones.families.unet.sites import plain_attention, sites
from diffusion_backbones.spec.activations import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class PixelUNet(UNet):
    """The family of ``UNet2DModel``. The latents are the image itself; the timestep alone conditions the network."""

    encoder = ""
    networks = ("UNet2DModel",)

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        levels = len(configs["unet"]["block_out_channels"])
        configs["unet"] |= {"block_out_channels": [8, 8, 16, 16, 24, 24][:levels], "norm_num_groups": 4}

    def sites(self) -> Iterator[Site]:
        each: int | None = self.config.get("attention_head_dim", 8)  # channels of a head; None is one head
        heads = [width // each if each else 1 for width in self.config["block_out_channels"]]
        mid = plain_attention if self.config.get("add_attention", True) else _nothing
        config = {**self.config, "attention_head_dim": heads, "mid_block_type": "UNetMidBlock2D"}
        return sites(config, 1, mid)

    @property
    def latent_channels(self) -> int:
        return int(self.config.get("in_channels", 3))

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ()

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

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        for prompt in prompts:
            if prompt:
                raise ValueError(f"prompt={prompt!r}: the timestep alone conditions this network, it takes no text")
        return {}


def _nothing(*_: Any) -> Iterator[Site]:
    return iter(())
