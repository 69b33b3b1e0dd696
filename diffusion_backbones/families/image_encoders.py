"""Image encoders: what turns an image into the latents that a denoiser works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


class ImageEncoder(Protocol):
    """An image encoder as the backbone uses it."""

    reading: str
    """What the latents are, for the cards."""

    def build(self, config: Config) -> nn.Module:
        """The stock encoder with everything that decodes still in it, on the current default device."""

    def truncate(self, encoder: nn.Module) -> nn.Module:
        """Remove, in place, what only decoding needs."""

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / stride, W / stride), before :meth:`scaling`."""

    def scaling(self, config: Config) -> tuple[float, float]:
        """(shift, factor): the denoiser was trained on (z - shift) * factor."""

    def stride(self, config: Config) -> int:
        """Pixels per latent position."""

    def sites(self, config: Config) -> list[Site]:
        """The maps that it computes on the way and that have an id, fine to coarse."""


class Pixels:
    """No encoder: the denoiser works on the image."""

    reading = "the image itself"

    def build(self, config: Config) -> nn.Module:
        from torch import nn

        return nn.Identity()

    def truncate(self, encoder: nn.Module) -> nn.Module:
        return encoder

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        return x

    def scaling(self, config: Config) -> tuple[float, float]:
        return 0.0, 1.0

    def stride(self, config: Config) -> int:
        return 1

    def sites(self, config: Config) -> list[Site]:
        return []


class DCEncoder:
    """The encoder half of diffusers' ``AutoencoderDC``, which gives latents and no distribution."""

    reading = "as the encoder gives them"

    def build(self, config: Config) -> nn.Module:
        from diffusers import AutoencoderDC

        vae: nn.Module = AutoencoderDC.from_config(config)
        return vae

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.decoder = None
        kept: nn.Module = encoder
        return kept

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        z: Tensor = encoder.encode(x, return_dict=False)[0]
        return z

    def scaling(self, config: Config) -> tuple[float, float]:
        return 0.0, config["scaling_factor"]

    def stride(self, config: Config) -> int:
        return _halved(config["encoder_block_out_channels"])

    def sites(self, config: Config) -> list[Site]:
        return []


class KLEncoder:
    """The encoder half of diffusers' ``AutoencoderKL``; the posterior is read at its mode, so the same image gives the
    same latents.
    """

    reading = "the mode of the posterior"

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

    def stride(self, config: Config) -> int:
        return _halved(config["block_out_channels"])

    def sites(self, config: Config) -> list[Site]:
        """Residual blocks at stride 1, 2, 4 ... and what takes one to the next."""
        sites, widths = [], config["block_out_channels"]
        for level, width in enumerate(widths):
            name, path, stride = f"encoder-level{level}", f"encoder.down_blocks.{level}", 2**level
            for repeat in range(config.get("layers_per_block", 1)):
                sites.append(
                    Site(
                        f"{name}-repeat{repeat}-res-out",
                        f"{path}.resnets.{repeat}",
                        "out",
                        width,
                        stride,
                        "map",
                        encoder=True,
                    )
                )
            if level < len(widths) - 1:
                sites.append(
                    Site(
                        f"{name}-downsampler-out",
                        f"{path}.downsamplers.0",
                        "out",
                        width,
                        2 * stride,
                        "map",
                        encoder=True,
                    )
                )
        return sites


class PatchKLEncoder(KLEncoder):
    """The encoder half of diffusers' ``AutoencoderKLFlux2``: latents are gathered into patches, then standardised by
    running statistics.
    """

    reading = "the mode of the posterior in patches, standardised channel by channel"

    def build(self, config: Config) -> nn.Module:
        from diffusers import AutoencoderKLFlux2

        vae: nn.Module = AutoencoderKLFlux2.from_config(config)
        return vae

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.bn.num_batches_tracked = None
        return super().truncate(encoder)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        z = F.pixel_unshuffle(super().encode(encoder, x), encoder.config.patch_size[0])
        return F.batch_norm(z, encoder.bn.running_mean, encoder.bn.running_var, eps=encoder.bn.eps)

    def scaling(self, config: Config) -> tuple[float, float]:
        return 0.0, 1.0

    def stride(self, config: Config) -> int:
        """Of patches: noise is mixed into latents that are already gathered, 128 channels at 16 pixels."""
        return super().stride(config) * int(config.get("patch_size", (2, 2))[0])


class FrameKLEncoder(KLEncoder):
    """The encoder half of diffusers' ``AutoencoderKLQwenImage``, which is one for video: an image is its first frame."""

    reading = "the mode of the posterior, standardised channel by channel"

    def build(self, config: Config) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        vae: nn.Module = AutoencoderKLQwenImage.from_config(config)
        return vae

    def truncate(self, encoder: Any) -> nn.Module:
        """Also remove what looks at later frames."""
        for layer in encoder.encoder.down_blocks:
            if hasattr(layer, "time_conv"):
                layer.time_conv = None
        return super().truncate(encoder)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        """Not by the stock ``encode``, which keeps what it saw on the network for the frames that follow."""
        config = encoder.config
        z: Tensor = encoder.quant_conv(encoder.encoder(x[:, :, None]))[:, : config.z_dim, 0]
        mean, std = (z.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return (z - mean) / std

    def scaling(self, config: Config) -> tuple[float, float]:
        return 0.0, 1.0

    def stride(self, config: Config) -> int:
        return int(2 ** len(config["temperal_downsample"]))

    def sites(self, config: Config) -> list[Site]:
        """None: its maps have an axis of frames."""
        return []


class DistilledEncoder:
    """The encoder half of diffusers' ``AutoencoderTiny``, which is distilled to give latents scaled as a denoiser takes
    them.

    They are brought back to those of the encoder that it stands for, so that all that follows is as behind that one.
    Its config has the scaling of that encoder, where :func:`diffusion_backbones.factory.tiny_encoder.config` put it;
    published ones say 1 and 0.
    """

    reading = "as the tiny encoder gives them"

    def build(self, config: Config) -> nn.Module:
        from diffusers import AutoencoderTiny

        derived = "block_out_channels"  # diffusers writes it into files, and complains when it reads it there
        vae: nn.Module = AutoencoderTiny.from_config({key: value for key, value in config.items() if key != derived})
        return vae

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.decoder = None
        kept: nn.Module = encoder
        return kept

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        shift, factor = self.scaling(encoder.config)
        z: Tensor = encoder.encode(channels_innermost(x), return_dict=False)[0]
        return (z / factor + shift).contiguous()

    def scaling(self, config: Config) -> tuple[float, float]:
        return config.get("shift_factor", 0.0), config.get("scaling_factor", 1.0)

    def stride(self, config: Config) -> int:
        return _halved(config["encoder_block_out_channels"])

    def sites(self, config: Config) -> list[Site]:
        """None: no recipe reads its maps, and no id names them."""
        return []


KINDS: dict[str, ImageEncoder] = {
    "AutoencoderKL": KLEncoder(),
    "AutoencoderKLFlux2": PatchKLEncoder(),
    "AutoencoderKLQwenImage": FrameKLEncoder(),
    "AutoencoderDC": DCEncoder(),
    "AutoencoderTiny": DistilledEncoder(),
}
"""Class in diffusers -> how it is used."""


def kind(config: Config) -> ImageEncoder:
    """How the encoder with a config is used; an empty one is of networks that work on pixels.

    Raises:
        ValueError: It is of a class that is not known here.
    """
    if not config:
        return Pixels()
    name = config.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"the image encoder is of class {name!r}, by its config.json; known are {', '.join(KINDS)}")
    return KINDS[name]


def channels_innermost(x: Tensor) -> Tensor:
    """The same images; on the CPU laid out with the channels of a pixel side by side, as every map behind them then is.

    Convolutions are faster so. Only for encoders without group norm, which torch computes less precisely on the CPU in
    this layout (``docs/encoder.md``).
    """
    import torch

    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _halved(widths: Sequence[int]) -> int:
    """Pixels per position behind blocks of these widths, between which height and width are halved."""
    return int(2 ** (len(widths) - 1))
