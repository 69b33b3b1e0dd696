"""What the shared code asks of a family of networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs, is_flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffusion_backbones.families.image_encoders import ImageEncoder
    from diffusion_backbones.ops.noise import ForwardProcess
    from diffusion_backbones.spec.recipe import Recipe

LoadText = Callable[[str], tuple[Any, Any]]
"""Component name of a text encoder -> (tokenizer, model), loaded on first use."""

EMBEDDINGS = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "prompt_attention_mask",
    "prompt_embeds_2",
    "prompt_attention_mask_2",
    "class_labels",
    "guidance",
)
TEXT = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_2")
"""Those that a prompt is embedded in."""


class Family(ABC):
    """How one kind of diffusion network is built, cut, conditioned and called.

    Methods that take configs are arithmetic: they neither build a network nor import torch.

    Attributes:
        denoiser: Component name of the denoiser, as in a diffusers folder.
        encoder: Component name of the image encoder, or "" for networks that work on pixels.
        networks: Class names that its denoisers have in their configs.
        registers: Learned tokens that stand before those of the text.
        reads_pipeline: Whether ``model_index.json`` matters, which names the pipeline's class.
        one_graph: Whether its networks compute the same whatever is in the tensors, so that they can be compiled and
            exported.
    """

    denoiser: str
    encoder: str
    networks: tuple[str, ...]
    registers = 0
    reads_pipeline = False
    one_graph = True

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
        """Cut the network behind the last of the module ``paths``; see :mod:`diffusion_backbones.ops.truncation`."""

    @abstractmethod
    def call(
        self,
        denoiser: nn.Module,
        z: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Tensor],
        size: tuple[int, int],
    ) -> Tensor:
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

    def activations(self, configs: Configs, network: str) -> Catalogue:
        """Those of the image encoder and those of :meth:`catalogue`."""
        return Catalogue(
            [*self.image_encoder(configs).sites(self.encoder_config(configs)), *self.catalogue(configs, network).all()],
            network,
        )

    def levels(self, configs: Configs, recipe: Recipe, catalogue: Catalogue) -> list[tuple[Site, ...]]:
        """The sites of every level of a recipe, fine to coarse.

        Raises:
            KeyError: The network lacks an id.
        """
        tokens = self.text_tokens(configs)
        return [tuple(catalogue[id].over_text(tokens) for id in level.activations) for level in recipe.levels]

    def blank_conditioning(self, configs: Configs) -> dict[str, Tensor]:
        """What conditions a network without weights, (1, ...) each, on the default device: zeros, as nothing was
        encoded.
        """
        import torch

        return {name: torch.zeros(1, *shape) for name, shape in self.conditioning_shapes(configs).items()}

    def activation(
        self,
        denoiser: nn.Module,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        """What a site gives, from what was recorded there.

        Args:
            denoiser: The network that ran.
            site: Where it was recorded.
            recorded: One tensor, or for an attention map what its taps gave.
            conditioning: What the call was conditioned on.
            grid: Height and width of the site's map of the padded image.
            average: Average attention maps over heads.
        """
        if site.port == "map":
            return self.attention(denoiser, site, recorded, conditioning, grid, average)
        x = recorded[0][:, -grid[0] * grid[1] :] if "[:, T:" in site.port else recorded[0]
        return x if site.part is None else x[..., site.part * site.channels : (site.part + 1) * site.channels]

    def attention(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        """An attention map as the network applies it: (B, heads, h·w, keys), or (B, h·w, keys) if averaged. Arguments
        as for :meth:`activation`.
        """
        from diffusion_backbones.ops.attention_maps import attention_map

        return attention_map(denoiser.get_submodule(site.path), recorded[0], recorded[1], average)

    def fill_buffers(self, denoiser: nn.Module, device: torch.device) -> None:  # noqa: B027  (most have none)
        """Compute, on ``device``, what a network that was built on ``meta`` has in no file."""

    def text_tokens(self, configs: Configs) -> int:
        """Keys of a ``cross-map``: the tokens of the text, 0 without one."""
        return self.conditioning_shapes(configs).get("prompt_embeds", (0,))[0]

    def image_rows(self, configs: Configs, length: int, tokens: int, stride: int) -> str | None:
        """Where an image is in a sequence, as the end of a :class:`Site`'s port: ``""`` if it is all of it, None if it
        is not there.

        Args:
            length: Of the sequence, with the longest text that there can be.
            tokens: Of the image, one for ``stride`` x ``stride`` pixels.
        """
        return {self.text_tokens(configs) + self.registers + tokens: "[:, T:]", tokens: ""}.get(length)

    def recognises(self, config: Config) -> bool:
        """Whether a denoiser's config is one of this family's."""
        return config.get("_class_name") in self.networks

    def encoder_config(self, configs: Configs) -> Config:
        """The image encoder's config, empty where there is no encoder."""
        config: Config = configs[self.encoder] if self.encoder else {}
        return config

    def image_encoder(self, configs: Configs) -> ImageEncoder:
        """The kind of image encoder in front of the denoiser."""
        from diffusion_backbones.families.image_encoders import kind

        return kind(self.encoder_config(configs))

    def forward_process(self, configs: Configs) -> ForwardProcess:
        """How noise is mixed into clean latents."""
        from diffusion_backbones.ops.noise import RectifiedFlow, VariancePreserving

        scheduler = configs["scheduler"]
        return RectifiedFlow() if is_flow(scheduler) else VariancePreserving.from_config(scheduler)

    def latent_channels(self, configs: Configs) -> int:
        """Channels of what the denoiser receives."""
        channels: int = configs[self.denoiser].get("in_channels", 4)
        return channels

    def latent_stride(self, configs: Configs) -> int:
        """Pixels per latent position."""
        return self.image_encoder(configs).stride(self.encoder_config(configs))

    def native_size(self, configs: Configs) -> int:
        """Side in pixels of the square images that the denoiser's config states."""
        side = configs[self.denoiser].get("sample_size") or 64
        return int(side if isinstance(side, int) else max(side)) * self.latent_stride(configs)
