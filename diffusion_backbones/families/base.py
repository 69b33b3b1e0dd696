"""What the shared code asks of an architecture: one kind of network, with the configs of one checkpoint."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_backbones.families.image_encoders import UNBUILDABLE, ImageEncoder, get_image_encoder
from diffusion_backbones.ops.execution_order import ExecutionOrder
from diffusion_backbones.ops.large_libraries import stock
from diffusion_backbones.spec.activations import Catalogue, Port, Site
from diffusion_backbones.spec.aggregated_attention import aggregated, at_each_stride
from diffusion_backbones.spec.concepts import Said
from diffusion_backbones.spec.configs import Config, Configs, drop_components, is_flow
from diffusion_backbones.spec.schedule import check_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffusion_backbones.ops.noise import ForwardProcess

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a conditioning tensor -> its shape, without the batch axis."""

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
"""Every tensor that a denoiser may be conditioned on, under the names of diffusers' pipelines."""
TEXT = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_2")
"""The tensors that a prompt is embedded in."""


class Architecture(ABC):
    """A family of networks, bound to the configs of one checkpoint: how its network is built, cut, conditioned, called.

    A family is a subclass in one file, with everything that is particular to it: where its activations are, in which
    order its parts run, how prompts become tensors, and a tiny config for tests. Properties are arithmetic on the
    configs: they neither build a network nor import torch.

    Args:
        configs: Component name -> its upstream config; None for a component that is left out.
        name: What to call the network in errors, usually the checkpoint's name.

    Attributes:
        denoiser: Component name of the denoiser, as in a diffusers folder.
        encoder: Component name of the image encoder, or "" for networks that work on pixels.
        networks: Class names that its denoisers have in their configs; the first is diffusers' class that is built.
        order: In which order the parts of the network run, and what may stand in for a part that is cut off.
        stages: Part of the denoiser -> its position from input (0) to output; numbered parts add their number.
        registers: Learned tokens that stand before those of the text.
        supplied: Key of the denoiser's config that asks for an input -> the values whose input is supplied. A key that
            is not in the config is None.
        wider: Channels of latents that some denoisers of its class take -> what these are, for errors.
        needs_model_index: Whether ``model_index.json`` matters, which names the pipeline's class.
        shifted: Whether its pipelines subtract the ``shift_factor`` of the image encoder, which then must be said.
        compilable: Whether its networks compute the same whatever is in the tensors, so that they can be compiled and
            exported.
        finest_aggregated: Pixels per position of the finest attention that is aggregated, as GDF sets it for each kind
            of network; 0 where it aggregates none.
        words: The text encoder whose tokens are the first of the text; empty where they are not told apart.
    """

    denoiser: ClassVar[str]
    encoder: ClassVar[str]
    networks: ClassVar[tuple[str, ...]]
    order: ClassVar[ExecutionOrder]
    stages: ClassVar[Mapping[str, int]]
    registers: ClassVar[int] = 0
    supplied: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    wider: ClassVar[Mapping[int, str]] = {}
    needs_model_index: ClassVar[bool] = False
    shifted: ClassVar[bool] = False
    compilable: ClassVar[bool] = True
    finest_aggregated: ClassVar[int] = 0
    words: ClassVar[str] = "text_encoder"

    def __init__(self, configs: Configs, name: str = "the network"):
        self.configs, self.name = configs, name

    # What a family says about networks that are not bound yet.

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Whether a denoiser's config is one of this family's."""
        return config.get("_class_name") in cls.networks

    @classmethod
    def depth(cls, path: str) -> int:
        """Position of a denoiser parameter from input (0) to output, for layer-wise learning rates."""
        stage, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        return cls.stages.get(stage, 0) + (int(number) if stage in cls.stages and number.isdigit() else 0)

    @classmethod
    @abstractmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        """Shrink the widths of a checkpoint's configs in place, for tests. Depths, kinds of blocks and flags stay."""

    def check(self) -> None:
        """Check that the network asks for no input but those that the family supplies.

        Raises:
            ValueError: It does; the message goes on behind the name of the denoiser's file.
        """
        for key, values in self.supplied.items():
            if self.config.get(key) not in values:
                raise ValueError(
                    f"has {key} {self.config[key]!r}, which asks for an input that is not supplied here; such networks "
                    f"are not read, only those with {key} {' or '.join(map(repr, values))}"
                )
        wanted, given = self.latent_channels, self.image_encoder.channels
        if wanted != given:
            known = f" (as those for {self.wider[wanted]} do)" if wanted in self.wider else ""
            raise ValueError(
                f"has in_channels {self.config['in_channels']}: the network takes {wanted} channels{known}, and the "
                f"image encoder gives {given}. Networks that take more than noisy latents are not read"
            )

    # What it is: arithmetic on the configs.

    @property
    def config(self) -> Config:
        """The denoiser's config."""
        config: Config = self.configs[self.denoiser]
        return config

    @property
    def encoder_config(self) -> Config:
        """The image encoder's config, empty where there is no encoder."""
        config: Config = self.configs[self.encoder] if self.encoder else {}
        return config

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """What turns an image into the latents that the denoiser works on."""
        return get_image_encoder(self.encoder_config)

    @cached_property
    def catalogue(self) -> Catalogue:
        """Every activation, the image encoder's first, then the denoiser's, in forward order."""
        inner = list(self.sites())
        finest, tokens = self.finest_aggregated, self.text_tokens
        several = aggregated(inner, finest, tokens, self.native_size) if finest else ()
        of_strides = at_each_stride(self.concept_sites, tokens)
        return Catalogue([*self.image_encoder.sites, *inner], self.name, self.find_module, [*several, *of_strides])

    @abstractmethod
    def sites(self) -> Iterable[Site]:
        """Every activation of the denoiser, in forward order."""

    @property
    @abstractmethod
    def size_divisibility(self) -> int:
        """What height and width in pixels are padded to a multiple of."""

    @property
    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape, without batch, of every tensor that conditions the denoiser, under diffusers' pipeline names."""

    @property
    @abstractmethod
    def text_encoders(self) -> tuple[str, ...]:
        """Component names of the text encoders, empty for class-conditional and unconditional networks."""

    @property
    def text_tokens(self) -> int:
        """Keys of a ``cross-map``: the tokens of the text, 0 without one."""
        return self.conditioning_shapes.get("prompt_embeds", (0,))[0]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config.get("in_channels", 4))

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position."""
        return self.image_encoder.stride

    @property
    def native_size(self) -> int:
        """Side in pixels of the square images that the denoiser's config states."""
        side = self.config.get("sample_size") or 64
        return int(side if isinstance(side, int) else max(side)) * self.latent_stride

    @property
    def forward_process(self) -> ForwardProcess:
        """How noise is mixed into clean latents; unknown where the scheduler's config does not say it."""
        from diffusion_backbones.ops.noise import RectifiedFlow, UnknownProcess, VariancePreserving  # torch

        scheduler = self.configs["scheduler"]
        try:
            check_schedule(scheduler)
        except ValueError as error:
            return UnknownProcess(str(error))
        return RectifiedFlow() if is_flow(scheduler) else VariancePreserving.from_config(scheduler)

    @property
    def concept_sites(self) -> list[Site]:
        """The maps of attention that concepts are read from: all to the text."""
        return [site for site in self.sites() if site.id.endswith("cross-map")]

    @property
    def concept_stride(self) -> int:
        """Pixels per position of a concept's map."""
        return self.size_divisibility

    def without(self, components: Iterable[str]) -> Architecture:
        """The same network with some components left out, as in a diffusers pipeline that was loaded without them."""
        return type(self)(drop_components(self.configs, components), self.name) if components else self

    def with_classes(self, n: int) -> Architecture:
        """The same network given a text of one token for each of ``n`` classes; itself for none.

        Raises:
            ValueError: Its text is no such.
        """
        if n:
            raise ValueError(
                f"{self.name} takes no classes, which are tokens of one CLIP; latent U-Nets with one text encoder do, "
                "such as those of sd15 and sd21"
            )
        return self

    def image_token_slice(self, length: int, tokens: int, stride: int) -> Port | None:
        """Where an image is in a sequence that a module returns; None if it is not there.

        Args:
            length: Of the sequence, with the longest text that there can be.
            tokens: Of the image, one for ``stride`` x ``stride`` pixels.
        """
        return {self.text_tokens + self.registers + tokens: Port(tokens="last"), tokens: Port()}.get(length)

    def find_module(self, path: str) -> Site:
        """The site of a stock module path that no activation id names; it is built on ``meta`` to see what it gives.

        Raises:
            KeyError: The network has no such module.
            ValueError: What the module gives is neither a map nor image tokens.
        """
        from diffusion_backbones.families.meta_trace import site  # torch

        return site(self, path)

    # The network: these take torch.

    def build_denoiser(self) -> nn.Module:
        """The stock, whole network with PyTorch's initialization, on the current default device."""
        network = stock(self.networks[0])
        known = inspect.signature(network).parameters  # older configs also hold the settings of a more general class
        try:
            denoiser: nn.Module = network(**{key: value for key, value in self.config.items() if key in known})
        except UNBUILDABLE as error:
            raise ValueError(
                f"{self.name}: diffusers cannot build {network.__name__} with this {self.denoiser}/config.json: {error}"
            ) from error
        return denoiser

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        """Cut a network behind the last of the module ``paths``; see :mod:`diffusion_backbones.ops.truncation`."""
        from diffusion_backbones.ops.truncation import truncate  # torch

        return truncate(denoiser, paths, self.order)

    def fill_buffers(self, denoiser: nn.Module, device: torch.device) -> None:  # noqa: B027  (most have none)
        """Compute, on ``device``, what a network that was built on ``meta`` has in no file."""

    def blank_conditioning(self) -> dict[str, Tensor]:
        """What conditions a network without weights, (1, ...) each, on the default device: zeros."""
        import torch

        return {name: torch.zeros(1, *shape) for name, shape in self.conditioning_shapes.items()}

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
            conditioning: Tensors of :attr:`conditioning_shapes` with a leading batch axis.
            size: Height and width in pixels of the image before padding.
        """

    @abstractmethod
    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """Prompts -> the tensors of :attr:`conditioning_shapes`, one row per prompt, float32.

        Raises:
            ValueError: A prompt is longer than the text encoder's limit.
        """

    def said(self, tokenizer: Any, prompt: str) -> Said:
        """What the tokenizer of :attr:`words` is given for a prompt."""
        return Said(prompt)

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
        if site.parts:
            return self.attention_of_parts(denoiser, site, recorded, conditioning, grid)
        if site.port.side == "map":
            return self.attention(denoiser, site, recorded, conditioning, grid, average)
        x = self.image_tokens(site.port, recorded[0], conditioning, grid[0] * grid[1])
        part = site.port.part
        return x if part is None else x[..., part * site.channels : (part + 1) * site.channels]

    def attention_of_parts(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
    ) -> Tensor:
        """The attention of several layers, one after another: aggregated, (B, keys of every size, h, w), or that of
        concepts, (B, concepts, h, w). Arguments as for :meth:`activation`.
        """
        from diffusion_backbones.ops.attention_of_layers import Aggregated, Concepts  # torch

        means, taps = Concepts(site.rows, grid) if site.rows else Aggregated(grid), iter(recorded)
        for part in site.parts:
            size = (grid[0] * site.stride // part.stride, grid[1] * site.stride // part.stride)
            own, average = tuple(islice(taps, len(part.modules))), means.averages(size)
            means.add(self.attention(denoiser, part, own, conditioning, size, average), part, size)
        return means.take()

    def image_tokens(self, port: Port, x: Tensor, conditioning: Mapping[str, Tensor], tokens: int) -> Tensor:
        """What of a recorded tensor belongs to the image, by the port that it was recorded at."""
        if port.tokens == "all":
            return x
        return x[:, :tokens] if port.tokens == "first" else x[:, -tokens:]

    def attention(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        """An attention map as the network applies it: (B, heads, h·w, keys), or (B, h·w, keys) if averaged.

        Arguments as for :meth:`activation`.
        """
        from diffusion_backbones.ops.attention_maps import attention_map  # torch

        return attention_map(denoiser.get_submodule(site.path), recorded[0], recorded[1], average)
