"""What the shared code asks of a family of networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.activations import Catalogue

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffusion_backbones.families.encoders import ImageEncoder
    from diffusion_backbones.noise import ForwardProcess

Config = Mapping[str, Any]
"""One component's upstream ``config.json``."""

Configs = Mapping[str, Config]
"""Component name (``unet``, ``vae``, ``scheduler`` ...) -> its config."""

LoadText = Callable[[str], tuple[Any, Any]]
"""Component name of a text encoder -> (tokenizer, model), loaded on first use."""


class Family(ABC):
    """How one kind of diffusion network is built, cut, conditioned and called.

    Methods that take configs are arithmetic: they neither build a network nor import torch.

    Attributes:
        denoiser: Component name of the denoiser, as in a diffusers folder.
        encoder: Component name of the image encoder, or "" for networks that work on pixels.
    """

    denoiser: str
    encoder: str

    @abstractmethod
    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        """Every activation of the network with these configs; ``network`` is its name in errors."""

    @abstractmethod
    def size_divisibility(self, configs: Configs) -> int:
        """What height and width in pixels are padded to a multiple of."""

    @abstractmethod
    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        """Shape, without batch, of every tensor that conditions the denoiser, under diffusers' pipeline names."""

    @abstractmethod
    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        """Component names of the text encoders, empty for class-conditional and unconditional networks."""

    @abstractmethod
    def build_denoiser(self, config: Config) -> nn.Module:
        """The stock, whole network with PyTorch's initialisation, on the current default device."""

    @abstractmethod
    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        """Cut the network behind the last of the module ``paths``; see :mod:`diffusion_backbones.truncate`."""

    @abstractmethod
    def call(self, denoiser: nn.Module, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Run the denoiser on noisy latents and return what it returns, which is meaningless once it is cut.

        Args:
            denoiser: A network of this family, possibly truncated.
            z: (B, C, h, w) noisy latents.
            timestep: (B,) what the network receives.
            conditioning: Tensors of :meth:`conditioning_shapes` with a leading batch axis.
            size: Height and width in pixels of the image before padding.
        """

    @abstractmethod
    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """Prompts -> the tensors of :meth:`conditioning_shapes`, one row per prompt, float32.

        Raises:
            ValueError: A prompt is longer than the text encoder's limit.
        """

    @abstractmethod
    def depth(self, path: str) -> int:
        """Position of a denoiser parameter from input (0) to output, for layer-wise learning rates."""

    # What almost every family shares.

    @property
    def image_encoder(self) -> ImageEncoder:
        """The kind of image encoder in front of the denoiser."""
        from diffusion_backbones.families.encoders import KLEncoder

        return KLEncoder()

    def forward_process(self, configs: Configs) -> ForwardProcess:
        """How noise is mixed into clean latents."""
        from diffusion_backbones.noise import VariancePreserving

        return VariancePreserving.from_config(configs["scheduler"])

    def latent_channels(self, configs: Configs) -> int:
        """Channels of what the denoiser receives."""
        channels: int = configs[self.denoiser].get("in_channels", 4)
        return channels

    def latent_stride(self, configs: Configs) -> int:
        """Pixels per latent position."""
        if not self.encoder:
            return 1
        return int(2 ** (len(configs[self.encoder]["block_out_channels"]) - 1))

    def native_size(self, configs: Configs) -> int:
        """Side in pixels of the square images that the denoiser's config states."""
        side = configs[self.denoiser].get("sample_size") or 64
        return int(side if isinstance(side, int) else max(side)) * self.latent_stride(configs)
