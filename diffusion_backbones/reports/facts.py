"""The facts about a checkpoint or a backbone, in words and as data: the one source of cards, ``info`` and its JSON.

Words are Markdown; :func:`diffusion_backbones.reports.markdown.plain` strips it for a terminal. Nothing here needs
torch, unless the costs of a backbone are not published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from diffusion_backbones.families import Architecture, architecture
from diffusion_backbones.families.image_encoders import TinyAutoencoder
from diffusion_backbones.reports import settings
from diffusion_backbones.reports.costs import Costs, costs, whole_network
from diffusion_backbones.reports.markdown import HUB, WEB, gflops, link, memory, millions, repository
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.checkpoint import Checkpoint, Paper, TinyEncoder
from diffusion_backbones.spec.configs import Configs, is_flow
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.levels import LevelInfo
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.schedule import noise_level
from diffusion_backbones.surgery.plan import Plan


def channels_at_strides(levels: Iterable[LevelInfo]) -> str:
    """``320@8 · 640@16 · 2560@32``: channels and stride in pixels of every map."""
    return " · ".join(f"{level.channels}@{level.stride}" for level in levels)


def shapes(levels: Iterable[LevelInfo], size: int) -> list[tuple[int, int, int, int]]:
    """Shape (1, C, h, w) of every map of one square image of ``size`` pixels."""
    return [(1, level.channels, side, side) for level in levels for side in (-(-size // level.stride),)]


def cite(paper: Paper) -> str:
    """``Meng et al. 2024``; by its title if its authors are not known."""
    if not paper.authors:
        return f"{paper.title.partition(':')[0]} {paper.year}"
    first, *others = paper.authors.split(" and ")
    return f"{first.partition(',')[0]}{' et al.' if others else ''} {paper.year}"


def read_by(checkpoint: Checkpoint) -> list[str]:
    """Names of the backbones that read this checkpoint with a published recipe."""
    return [name for name in registry.list_models() if registry.get_declaration(name).checkpoint == checkpoint]


def access(checkpoint: Checkpoint) -> str:
    """How to get the weights: ``gated``, ``open``, or ``built in`` if they travel in the package."""
    return "gated" if checkpoint.gated else "open" if checkpoint.hub_id else "built in"


def license_link(checkpoint: Checkpoint) -> str:
    """The licence of the weights, linked to its text."""
    return link(str(checkpoint.license), checkpoint.license.link)


@dataclass(frozen=True)
class Facts:
    """The facts that a checkpoint and a backbone have in common: those about the weights and the network.

    Args:
        declaration: The backbone; for a checkpoint, its whole network.
        network: The network, without the components that the recipe leaves out.
        configs: Its architecture, if it is not the one that the package has for the checkpoint.
    """

    declaration: Declaration
    network: Architecture
    configs: Configs | None

    @property
    def name(self) -> str:
        """The name that ``create_model`` takes."""
        return self.declaration.name

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that holds the weights."""
        return self.declaration.checkpoint

    @cached_property
    def cost(self) -> Costs:
        """The costs of one image."""
        return costs(self.declaration, self.configs)

    def metadata(self, *tags: str) -> dict[str, Any]:
        """The front matter that the hub reads. It has no model-index, because this package measured no number with
        these weights.
        """
        checkpoint, terms = self.checkpoint, self.checkpoint.license
        other = terms.id == "other"
        base = [checkpoint.denoiser.repo, checkpoint.hub_id] if checkpoint.denoiser else checkpoint.hub_id
        found = {
            "library_name": "diffusion_backbones",
            "pipeline_tag": "image-feature-extraction",
            "license": terms.id,
            "license_name": re.sub(r"[^a-z0-9.-]+", "-", terms.name.lower()).strip("-") if other else None,
            "license_link": terms.link if other and re.fullmatch(WEB, terms.link) else None,
            "base_model": base if checkpoint.hub_id else None,
            "tags": ["image-feature-extraction", "diffusion", "feature-pyramid", checkpoint.family, *tags],
        }
        return {key: value for key, value in found.items() if value is not None}

    @property
    def weights(self) -> str:
        """The place of the weights: repositories, commit, mirrors, status."""
        checkpoint, file = self.checkpoint, self.checkpoint.denoiser
        if not checkpoint.hub_id:
            return ". ".join(filter(None, ["in the package", checkpoint.status]))
        commit = f" at `{checkpoint.revision[:12]}`" if checkpoint.revision != "main" else ""
        place = repository(checkpoint.hub_id) + commit
        if file:
            place = f"denoiser from {repository(file.repo)} (`{file.filename}`), the rest from {place}"
        mirrors = ", ".join(map(repository, checkpoint.mirrors))
        tried = f"Mirrors, tried in this order: {mirrors}" if mirrors else ""
        return ". ".join(filter(None, [place, tried, checkpoint.status.rstrip(".")]))

    @property
    def input(self) -> str:
        """Shape, range and sizes of an input image."""
        divisor = self.network.size_divisibility
        return f"(B, 3, H, W), RGB in [-1, 1], any height and width, padded inside to multiples of {divisor}"

    def latents(self, scaled: bool = True) -> str:
        """The latents before noise is added: channels, stride and scaling."""
        encoder = self.network.image_encoder
        shift, factor = encoder.scaling
        moved = f"{f'less {shift:g}, ' if shift else ''}multiplied by {factor:g}"
        if encoder.statistics:
            moved = f"standardised channel by channel, {moved}"
        if not scaled:
            moved = "not scaled"
        elif (shift, factor) == (0, 1):
            moved = "as they are"
        where = f"{self.network.latent_channels} channels at stride {self.network.latent_stride}"
        return f"{where}, {encoder.latent_description}, {moved}"

    def operations(self, times: str = "") -> str:
        """GFLOPs of denoiser and image encoder; ``times`` is written in front of the denoiser's."""
        cost = self.cost
        return (
            f"denoiser {times}{gflops(cost.denoiser_gflops)} GFLOPs, image encoder {gflops(cost.encoder_gflops)} GFLOPs"
        )

    @property
    def memory(self) -> str:
        """The memory that the kept weights take."""
        return f"{memory(self.cost.bytes)} in float32"

    @property
    def float16(self) -> str:
        """The limit of float16, or empty."""
        return "" if self.checkpoint.encoder_float16 else "the image encoder overflows in float16 and stays in float32"

    @property
    def licence(self) -> str:
        """The terms of the weights, how to get them, and the limits of their features."""
        checkpoint = self.checkpoint
        unconfirmed = "" if checkpoint.license.verified else ", which no source at hand confirms"
        terms = f"The weights are under {license_link(checkpoint)}{unconfirmed}"
        gate = {
            "gated": f"Access is gated: accept the terms at {HUB}/{checkpoint.hub_id} and log in with `hf auth login` "
            "first. ",
            "open": "Access is not gated. ",
            "built in": "",
        }[access(checkpoint)]
        described = "; its own card describes them" if checkpoint.hub_id else ""
        return (
            f"{terms}; the code of this package is under Apache-2.0. {gate}The features carry the limits and biases of "
            f"the checkpoint and of the images it was trained on{described}."
        )

    @property
    def doubts(self) -> list[str]:
        """Facts about the checkpoint that no source at hand confirms, its licence included."""
        stated = self.checkpoint.license.verified
        return [*self.checkpoint.unverified, *([] if stated else ["No source at hand states the licence."])]

    @property
    def costs(self) -> dict[str, Any]:
        """The costs of one image, JSON-able."""
        return {**asdict(self.cost), "bytes": self.cost.bytes}


class CheckpointFacts(Facts):
    """The facts about a checkpoint, before a recipe is chosen. Costs are those of its whole network."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CheckpointFacts:
        """The facts about a checkpoint whose architecture is in the package."""
        return cls(whole_network(checkpoint), architecture(checkpoint), None)

    @cached_property
    def backbones(self) -> list[str]:
        """Names of the backbones that read it with a published recipe."""
        return read_by(self.checkpoint)

    @property
    def papers(self) -> list[Paper]:
        """The papers to cite."""
        return [self.checkpoint.paper] if self.checkpoint.paper else []

    @property
    def noise(self) -> str:
        """The forward process, with the noise levels of two timesteps as examples."""
        scheduler = self.network.configs["scheduler"]
        kind = (
            "rectified flow, z_t = (1 - t / 1000) z + t / 1000 noise"
            if is_flow(scheduler)
            else "variance preserving, z_t = alpha_t z + sigma_t noise"
        )
        levels = {t: noise_level(scheduler, t) for t in (50, 261)}
        examples = (f"{alpha:.4f} z + {sigma:.4f} noise at t = {t}" for t, (alpha, sigma) in levels.items())
        return f"{kind}: {', '.join(examples)}"

    @property
    def conditioning(self) -> str:
        """The conditioning tensors of a call, without batch, and the encoders that compute them from a prompt."""
        tensors = [
            f"`{name}` ({', '.join(map(str, shape))})" if shape else f"`{name}`"
            for name, shape in self.network.conditioning_shapes.items()
        ]
        if not tensors:
            return "the timestep alone"
        encoders = ", ".join(f"`{name}`" for name in self.network.text_encoders)
        return ", ".join(tensors) + (f"; from {encoders}" if encoders else "")

    @property
    def activations(self) -> int:
        """Number of activation ids of the network, those of its image encoder too."""
        return len(self.network.catalogue.all())

    @property
    def parameters(self) -> str:
        """Parameters of the whole network."""
        cost = self.cost
        return f"denoiser {millions(cost.parameters_total)}, image encoder {millions(cost.encoder_parameters)}"

    def as_dict(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        return {
            "name": self.name,
            "checkpoint": asdict(self.checkpoint),
            "backbones": self.backbones,
            "conditioning": self.network.conditioning_shapes,
            "activations": self.activations,
            "costs": self.costs,
        }


@dataclass(frozen=True)
class BackboneFacts(Facts):
    """The facts about a backbone. Made by :meth:`of`.

    Args:
        plan: The levels that its recipe reads.
    """

    plan: Plan

    @classmethod
    def of(cls, declaration: Declaration, configs: Configs | None = None) -> BackboneFacts:
        """The facts about a declaration, for its checkpoint's packaged configs unless others are given."""
        plan = Plan.of(declaration, configs)
        return cls(declaration, plan.architecture, configs, plan)

    @property
    def recipe(self) -> Recipe:
        """The recipe by which the checkpoint is read."""
        return self.declaration.recipe

    @property
    def papers(self) -> list[Paper]:
        """The papers to cite, each once."""
        return list(dict.fromkeys(filter(None, (self.recipe.paper, self.checkpoint.paper))))

    @property
    def summary(self) -> str:
        """One sentence."""
        paper, levels = self.recipe.paper, self.plan.levels
        chosen = (
            f"the recipe `{self.recipe.name}` of {link(cite(paper), paper.link)}"
            if paper
            else f"the unpublished recipe `{self.recipe.name}`"
        )
        return (
            f"{self.checkpoint.title}, frozen and read by {chosen}: an image in, {len(levels)} feature "
            f"map{'s' * (len(levels) > 1)} out ({channels_at_strides(levels)}, channels at stride)."
        )

    @property
    def timestep(self) -> str:
        """The timesteps that the network receives, and the number that the source gives it."""
        nominal = self.recipe.nominal_timestep
        return settings.timesteps(self.recipe) + ("" if nominal is None else f", which the source counts as {nominal}")

    @property
    def noise(self) -> str:
        """The noise level of the timestep, and how noise is drawn."""
        return settings.noise(self.recipe, self.network.configs["scheduler"])

    @property
    def prompt(self) -> str:
        """The text that conditions the network."""
        if self.network.text_encoders:
            padded = self.recipe.prompt_padding == "max_length"
            padding = "padded to the text encoder's limit" if padded else "not padded"
            if self.recipe.classes:
                padding = f"one token for each of {len(self.recipe.classes)} classes: {', '.join(self.recipe.classes)}"
            return f"{repr(self.recipe.prompt) if self.recipe.prompt else 'empty'}, {padding}"
        if "class_labels" in self.network.conditioning_shapes:
            return "none; the network is given no class, unless a call says `class_labels=`"
        return "none"

    @property
    def kept(self) -> str:
        """Parameters of the denoiser: those that the recipe reaches, of all."""
        return f"{millions(self.cost.parameters)} of {millions(self.cost.parameters_total)}"

    @property
    def in_place(self) -> bool:
        """Whether its image encoder is a tiny one, in place of the checkpoint's own."""
        return isinstance(self.network.image_encoder, TinyAutoencoder)

    @property
    def tiny_encoder(self) -> TinyEncoder | None:
        """The tiny encoder that may replace its own, if there is one."""
        fits = self.cost.tiny_encoder_gflops and not self.in_place
        return self.checkpoint.tiny_encoder if fits else None

    @property
    def tiny_encoder_link(self) -> str:
        """The checkpoint's tiny encoder and its licence, or nothing."""
        tiny = self.checkpoint.tiny_encoder
        if not tiny:
            return ""
        return f"{repository(tiny.file.repo) if tiny.file else 'the one in the package'} ({tiny.license})"

    @property
    def unverified(self) -> list[str]:
        """Facts that no source at hand confirms."""
        return [*self.checkpoint.unverified, *self.recipe.unverified]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's ``feature_info``, fine to coarse."""
        return [
            {"num_chs": level.channels, "reduction": level.stride, "module": level.module, "index": i}
            for i, level in enumerate(self.plan.levels)
        ]

    def as_dict(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        return {
            "name": self.name,
            "checkpoint": asdict(self.checkpoint),
            "recipe": self.recipe.to_dict(),
            "recipe_digest": self.recipe.digest,
            "feature_info": self.feature_info,
            "costs": self.costs,
            "pretrained_cfg": pretrained_cfg(self.declaration),
        }
