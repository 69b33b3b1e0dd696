"""Image encoders: what turns an image into the latents that a denoiser works on, by their class in diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_backbones.ops.large_libraries import stock
from diffusion_backbones.spec.activations import OUT, Site
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


OLD_SCALING = 0.18215
"""What diffusers' pipelines multiplied latents by before configs said it."""
UNBUILDABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NotImplementedError)
"""What diffusers' constructors raise for configs that do not describe a network."""
STATISTICS = ("latents_mean", "latents_std")


class ImageEncoder:
    """An image encoder with its config. By itself it is none: the denoiser works on pixels.

    Args:
        config: Its upstream config, empty for pixels.

    Attributes:
        network: Its class in diffusers.
        latent_description: What the latents are, for the cards.
    """

    network: ClassVar[str] = ""
    latent_description: ClassVar[str] = "the image itself"

    def __init__(self, config: Config):
        self.config = config

    @property
    def stride(self) -> int:
        """Pixels per latent position."""
        return 1

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return 3

    @property
    def scaling(self) -> tuple[float, float]:
        """(shift, factor): the denoiser was trained on (z - shift) * factor."""
        return 0.0, 1.0

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and deviation of each channel, where the denoiser was trained on (z - mean) * factor / deviation."""
        return None

    def scaled(self, z: Tensor) -> Tensor:
        """(B, C, h, w) latents as :meth:`encode` gives them -> as the denoiser takes them."""
        shift, factor = self.scaling
        return (z - shift) * factor

    def check(self) -> None:
        """Check that the config says what latents depend on.

        Raises:
            ValueError: A key is missing or has a value that cannot be; the message goes on behind the file's name.
        """

    @property
    def sites(self) -> list[Site]:
        """The maps that it computes on the way and that have an id, fine to coarse."""
        return []

    def build(self) -> nn.Module:
        """The whole stock autoencoder, decoder included, on the current default device."""
        from torch import nn

        return nn.Identity()

    def truncate(self, encoder: Any) -> nn.Module:
        """Remove, in place, what only decoding needs."""
        kept: nn.Module = encoder
        return kept

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / stride, W / stride), before :attr:`scaling`."""
        return x


class Autoencoder(ImageEncoder):
    """The encoder half of one of diffusers' autoencoders."""

    @property
    def channels(self) -> int:
        return int(self.config.get("latent_channels", 4))

    def check(self) -> None:
        if (channels := self.config.get("in_channels", 3)) != 3:
            raise ValueError(f"has in_channels {channels!r}, and images have 3")
        shift, factor = self.scaling
        if not (_is_number(factor) and factor > 0):
            raise ValueError(f"has scaling_factor {factor!r}; it must be a number above 0")
        if not _is_number(shift):
            raise ValueError(f"has shift_factor {shift!r}; it must be a number")

    def build(self) -> nn.Module:
        try:
            autoencoder: nn.Module = stock(self.network).from_config(self.config)
        except UNBUILDABLE as error:
            raise ValueError(f"diffusers cannot build {self.network} with this vae/config.json: {error}") from error
        return autoencoder

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.decoder = None
        return super().truncate(encoder)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        z: Tensor = encoder.encode(x, return_dict=False)[0]
        return z


class AutoencoderDC(Autoencoder):
    """diffusers' deep-compression autoencoder, which gives latents and no distribution."""

    network = "AutoencoderDC"
    latent_description = "as the encoder gives them"

    @property
    def scaling(self) -> tuple[float, float]:
        return 0.0, self.config.get("scaling_factor")  # type: ignore[return-value]  # checked

    @property
    def stride(self) -> int:
        return _halved(self.config["encoder_block_out_channels"])


class AutoencoderKL(Autoencoder):
    """diffusers' KL autoencoder; the posterior is read at its mode, so the same image gives the same latents."""

    network = "AutoencoderKL"
    latent_description = "the mode of the posterior"

    @property
    def scaling(self) -> tuple[float, float]:
        return self.config.get("shift_factor") or 0.0, self.config.get("scaling_factor", OLD_SCALING)

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]] | None:
        mean, deviation = (self.config.get(name) for name in STATISTICS)
        return None if mean is None or deviation is None else (mean, deviation)

    def scaled(self, z: Tensor) -> Tensor:
        """As in diffusers' pipelines, which leave the shift out where there are statistics."""
        if self.statistics is None:
            return super().scaled(z)
        mean, deviation = (z.new_tensor(list(values))[:, None, None] for values in self.statistics)
        return (z - mean) * self.scaling[1] / deviation

    def check(self) -> None:
        super().check()
        check_statistics(self.config, self.channels)
        blocks, widths = (self.config.get(key, ()) for key in ("down_block_types", "block_out_channels"))
        if len(blocks) != len(widths):
            raise ValueError(f"has {len(blocks)} down_block_types, and block_out_channels says {len(widths)} levels")
        if self.statistics and self.scaling[0]:
            raise ValueError(f"has shift_factor {self.scaling[0]!r} beside latents_mean; it must have one of them")

    @property
    def stride(self) -> int:
        return _halved(self.config["block_out_channels"])

    @property
    def sites(self) -> list[Site]:
        """Residual blocks at stride 1, 2, 4 ... and what takes one to the next."""
        sites, widths = [], self.config["block_out_channels"]
        for level, width in enumerate(widths):
            name, path, stride = f"encoder-level{level}", f"encoder.down_blocks.{level}", 2**level
            for repeat in range(self.config.get("layers_per_block", 1)):
                at = (f"{name}-repeat{repeat}-res-out", f"{path}.resnets.{repeat}")
                sites.append(Site(*at, OUT, width, stride, "map", encoder=True))
            if level < len(widths) - 1:
                at = (f"{name}-downsampler-out", f"{path}.downsamplers.0")
                sites.append(Site(*at, OUT, width, 2 * stride, "map", encoder=True))
        return sites

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.post_quant_conv = None
        return super().truncate(encoder)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        z: Tensor = encoder.encode(x, return_dict=False)[0].mode()
        return z


class Flux2VAE(AutoencoderKL):
    """FLUX.2's KL autoencoder: latents are gathered into patches, then standardized by running statistics."""

    network = "AutoencoderKLFlux2"
    latent_description = "the mode of the posterior in patches, standardised channel by channel"

    @property
    def channels(self) -> int:
        return super().channels * math.prod(self.config.get("patch_size", (2, 2)))

    @property
    def scaling(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def stride(self) -> int:
        """Pixels per patch: noise is mixed into latents that are already gathered, 128 channels at 16 pixels."""
        return super().stride * int(self.config.get("patch_size", (2, 2))[0])

    def truncate(self, encoder: Any) -> nn.Module:
        encoder.bn.num_batches_tracked = None
        return super().truncate(encoder)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        z = F.pixel_unshuffle(super().encode(encoder, x), encoder.config.patch_size[0])
        return F.batch_norm(z, encoder.bn.running_mean, encoder.bn.running_var, eps=encoder.bn.eps)


class QwenImageVAE(AutoencoderKL):
    """Qwen-Image's KL autoencoder, which is one for video: an image is its first frame."""

    network = "AutoencoderKLQwenImage"
    latent_description = "the mode of the posterior, standardised channel by channel"

    @property
    def channels(self) -> int:
        return int(self.config.get("z_dim", 16))

    @property
    def scaling(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def statistics(self) -> None:
        """None: they are part of :meth:`encode`."""
        return

    @property
    def stride(self) -> int:
        return int(2 ** len(self.config["temperal_downsample"]))

    @property
    def sites(self) -> list[Site]:
        """None: its maps have an axis of frames."""
        return []

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


class TinyAutoencoder(Autoencoder):
    """diffusers' ``AutoencoderTiny`` (TAESD and its kin), distilled to give latents scaled as a denoiser takes them.

    They are brought back to those of the encoder that it stands for, so that all that follows is as behind that one.
    Its config has the scaling of that encoder, where :func:`diffusion_backbones.factory.tiny_encoder.fitted` put it;
    published ones say 1 and 0. No recipe reads its maps, and no id names them.
    """

    network = "AutoencoderTiny"
    latent_description = "as the tiny encoder gives them"

    @property
    def scaling(self) -> tuple[float, float]:
        return self.config.get("shift_factor") or 0.0, self.config.get("scaling_factor", 1.0)

    @property
    def stride(self) -> int:
        return _halved(self.config["encoder_block_out_channels"])

    def build(self) -> nn.Module:
        derived = "block_out_channels"  # diffusers writes it into files, and complains when it reads it there
        autoencoder: nn.Module = stock(self.network).from_config({k: v for k, v in self.config.items() if k != derived})
        return autoencoder

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        shift, factor = self.scaling
        z = super().encode(encoder, channels_innermost(x))
        return (z / factor + shift).contiguous()


KINDS: dict[str, type[ImageEncoder]] = {
    kind.network: kind for kind in (AutoencoderKL, Flux2VAE, QwenImageVAE, AutoencoderDC, TinyAutoencoder)
}
"""Class in diffusers -> how it is used."""


def get_image_encoder(config: Config) -> ImageEncoder:
    """The encoder with a config; an empty one is of networks that work on pixels.

    Raises:
        ValueError: It is of a class that is not known here.
    """
    if not config:
        return ImageEncoder(config)
    name = config.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"the image encoder is of class {name!r}, by its config.json; known are {', '.join(KINDS)}")
    return KINDS[name](config)


def check_statistics(config: Config, channels: int) -> None:
    """Check that a config has mean and deviation of each channel of the latents, or neither.

    Raises:
        ValueError: It has one, or other values; the message goes on behind the file's name.
    """
    mean, deviation = (config.get(name) for name in STATISTICS)
    values: Any
    for name, values, other in zip(STATISTICS, (mean, deviation), (deviation, mean), strict=True):
        if values is None and other is None:
            continue
        listed = isinstance(values, Sequence) and len(values) == channels and all(map(_is_number, values))
        if not listed or (name == STATISTICS[1] and min(values) <= 0):
            kind = "numbers" if name == STATISTICS[0] else "numbers above 0"
            raise ValueError(f"has {name} {values!r}; it must be {channels} {kind}, one for each channel of latents")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
