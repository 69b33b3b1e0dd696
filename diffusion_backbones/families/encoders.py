"""Image encoders: what turns an image into the latents that a denoiser works on."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from diffusion_backbones.families.base import Config


class ImageEncoder(Protocol):
    """An image encoder as the backbone uses it."""

    def build(self, config: Config) -> nn.Module:
        """The stock encoder with everything that decodes still in it, on the current default device."""

    def truncate(self, encoder: nn.Module) -> nn.Module:
        """Remove, in place, what only decoding needs."""

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / stride, W / stride), before scaling."""

    def scaling(self, config: Config) -> tuple[float, float]:
        """(shift, factor): the denoiser was trained on (z - shift) * factor."""


class KLEncoder:
    """The encoder half of diffusers' ``AutoencoderKL``; the posterior is read at its mode, so the same image gives the same latents."""

    def build(self, config: Config) -> nn.Module:
        from diffusers import AutoencoderKL

        vae: nn.Module = AutoencoderKL.from_config(config)
        return vae

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.decoder = None
        encoder.post_quant_conv = None
        kept: nn.Module = encoder
        return kept

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        z: Tensor = encoder.encode(x, return_dict=False)[0].mode()
        return z

    def scaling(self, config: Config) -> tuple[float, float]:
        # diffusers' default for configs written before the key existed, as SD 1.x's is
        return config.get("shift_factor") or 0.0, config.get("scaling_factor") or 0.18215
