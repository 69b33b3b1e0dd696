"""A plan: what one recipe reads of one architecture.

The factory, costs, cards, benchmarks and selection all ask it, so a recipe becomes levels, sites, module paths and a
truncated network in this one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from diffusion_backbones.families import Architecture, architecture
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Configs, package_configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.inversion import Inversion
from diffusion_backbones.spec.levels import LevelInfo, encoder_levels, make_levels, take
from diffusion_backbones.spec.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Plan:
    """What one recipe reads of one architecture. Made by :meth:`of`.

    Args:
        declaration: Name, checkpoint and recipe.
        architecture: The checkpoint's network, without what the recipe leaves out.
        levels: What is read, fine to coarse.
        truncated: Whether the network is cut behind the last activation of the plan, or behind the last that it has.
    """

    declaration: Declaration
    architecture: Architecture
    levels: tuple[LevelInfo, ...]
    truncated: bool = True

    @classmethod
    def of(cls, declaration: Declaration, configs: Configs | None = None, truncate: bool = True) -> Plan:
        """The plan of a declaration, for its checkpoint's packaged configs unless others are given.

        Raises:
            KeyError: The network lacks an activation of the recipe.
            ValueError: Levels that cannot be, or a recipe that asks for what an activation or a network does not have.
        """
        recipe, whole = declaration.recipe, architecture(declaration.checkpoint, configs)
        network = whole.without(recipe.without).with_classes(len(recipe.classes))
        _check_without(recipe, whole, network)
        ids, tokens = [level.activations for level in recipe.levels], network.text_tokens
        sites = [[network.catalogue[name].over_text(tokens) for name in level] for level in ids]
        levels = make_levels(sites, recipe.concatenated, recipe.components)
        return cls(declaration, network, levels, truncate)

    def select(self, indices: int | Sequence[int] | None) -> Plan:
        """The plan of fewer levels, in the order fine to coarse; see :func:`~diffusion_backbones.spec.levels.take`."""
        return replace(self, levels=tuple(self.levels[i] for i in sorted(take(indices, len(self.levels)))))

    def with_encoder_levels(self, strides: Sequence[int]) -> Plan:
        """The plan with levels of the image encoder for those strides that are finer than all of the recipe's.

        Raises:
            ValueError: The image encoder has no map at such a stride.
        """
        return replace(self, levels=(*encoder_levels(self.catalogue_sites, strides, self.levels), *self.levels))

    @property
    def catalogue_sites(self) -> list[Site]:
        """Every site of the network, image encoder included."""
        return self.architecture.catalogue.all()

    @cached_property
    def sites(self) -> list[Site]:
        """What the levels are made of, each site once."""
        return unique_sites(self.levels)

    @property
    def encoder_sites(self) -> list[Site]:
        """The sites in the image encoder."""
        return [site for site in self.sites if site.encoder]

    @property
    def denoiser_sites(self) -> list[Site]:
        """What is recorded in the denoiser: the rest, and what modulates it."""
        return self.recorded(self.sites)

    def recorded(self, sites: Iterable[Site]) -> list[Site]:
        """The sites of the denoiser that must be recorded for some of the plan's sites."""
        inner = [site for site in sites if not site.encoder]
        adaptive = self.declaration.recipe.normalize == "adaptive"
        return [*inner, *(site.modulation_site for site in inner)] if adaptive else inner

    @property
    def paths(self) -> list[str]:
        """The denoiser's modules that are kept: those that are recorded, or all that any activation is read from."""
        sites = self.denoiser_sites if self.truncated else [*self.architecture.sites(), *self.denoiser_sites]
        whole = [""] if self.inversion else []  # which runs to its end
        return [*whole, *(path for site in sites for path in site.modules)]

    @cached_property
    def inversion(self) -> Inversion | None:
        """The steps that lead to the recipe's noisy latents, where these are inverted.

        Raises:
            ValueError: The checkpoint's schedule has no inversion, or not in so many steps.
        """
        recipe = self.declaration.recipe
        if recipe.noise != "inversion":
            return None
        return Inversion.of(self.architecture.configs["scheduler"], recipe.inversion_steps)

    @property
    def received(self) -> tuple[float, ...]:
        """Every timestep that the network receives in a call of the recipe.

        Raises:
            ValueError: An inversion does not come by one of them.
        """
        several = self.declaration.recipe.all_timesteps
        return self.inversion.passed(several) if self.inversion else several

    @property
    def passes(self) -> int:
        """How many noisy latents of an image the network is run on: every noise draw at every timestep, and every step
        of an inversion.
        """
        recipe = self.declaration.recipe
        return recipe.ensemble * len(recipe.all_timesteps) + (len(self.received) if self.inversion else 0)

    @property
    def reads_text(self) -> bool:
        """Whether a level has one channel for each token of the text."""
        return any(site.reads_text for site in self.sites)

    @cached_property
    def encoder_overflows(self) -> bool:
        """Whether the image encoder must not run in float16: the checkpoint is declared so, or its own config says
        ``force_upcast`` and is not the one that the declaration was made for.
        """
        checkpoint, network = self.declaration.checkpoint, self.architecture
        declared = package_configs(checkpoint).get(network.encoder, {})
        own = network.encoder_config.get("force_upcast", False) and not declared.get("force_upcast", False)
        return bool(own) or not checkpoint.encoder_float16

    @property
    def size(self) -> int:
        """Side in pixels of the recipe's square image, padded as the backbone pads it."""
        size, divisor = self.declaration.input_size, self.architecture.size_divisibility
        return size + -size % divisor

    def check_postprocessing(self) -> None:
        """Raise ``ValueError`` if the recipe asks for what one of its activations or levels does not have."""
        recipe = self.declaration.recipe
        for level in (level for level in self.levels if level.in_denoiser):
            for what, asked, less in (("debias", recipe.debias, 1), ("components", recipe.components, 0)):
                if asked and asked > (most := level.width - less):
                    raise ValueError(
                        f"recipe {recipe.name!r}: {what}={asked}, and the level of {level.sites[0].id} has "
                        f"{level.width} channels, so that it must be at most {most}"
                    )
        for site in (site for site in self.sites if not site.encoder):
            if (discarded := recipe.discarded(site.id)) and max(discarded) >= site.channels:
                raise ValueError(
                    f"recipe {recipe.name!r}: discard={discarded}, and {site.id} has channels 0 to {site.channels - 1}"
                )
            if recipe.normalize == "adaptive" and not site.modulation:
                raise ValueError(
                    f"recipe {recipe.name!r}: normalize='adaptive' needs a block with an adaptive LayerNorm behind the "
                    f"activation, and there is none behind {site.id}; take the output of another transformer block, or "
                    "normalize='layer'"
                )

    def cut(self, denoiser: nn.Module) -> nn.Module:
        """A stock denoiser without what the plan does not reach, in place."""
        return self.architecture.truncate(denoiser, self.paths)

    def denoiser(self) -> nn.Module:
        """The stock denoiser without what the plan does not reach, on the current default device."""
        return self.cut(self.architecture.build_denoiser())


def unique_sites(levels: Iterable[LevelInfo]) -> list[Site]:
    """The sites of some levels, each once, in order."""
    return list(dict.fromkeys(site for level in levels for site in level.sites))


def _check_without(recipe: Recipe, whole: Architecture, network: Architecture) -> None:
    """Check that the components that a recipe leaves out are text encoders that the network can do without."""
    present = {
        name: config for name, config in whole.configs.items() if config is not None
    }  # a saved folder lacks some
    known, kept = type(whole)(present, whole.name).text_encoders, network.text_encoders
    for name in recipe.without:
        if name in kept or name not in known:
            raise ValueError(
                f"recipe {recipe.name!r}: without={name!r} is not a text encoder that this checkpoint can do without; "
                f"it has {', '.join(known) or 'none'}"
            )
