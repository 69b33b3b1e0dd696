"""The part of a selection that needs no weights: candidates, their costs, and whether data and budget suit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory.entry_points import architecture, create_model
from diffusion_backbones.reports import costs
from diffusion_backbones.selection import rules as filtering
from diffusion_backbones.selection.choose import Budget
from diffusion_backbones.selection.data import Data
from diffusion_backbones.selection.measure import FEWEST, candidates, check_images, matching
from diffusion_backbones.selection.prefix_cost import PrefixCost, prefix_costs
from diffusion_backbones.selection.result import number
from diffusion_backbones.selection.rules import Rule
from diffusion_backbones.selection.tasks import Task
from diffusion_backbones.selection.treatment import Treatment
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Configs


@dataclass(frozen=True)
class Network:
    """The network whose activations are chosen, and how it is read.

    Args:
        checkpoint, pretrained, checkpoint_path, device: As in :func:`~diffusion_backbones.create_model`.
        timestep: Timestep at which it is read.
        prompt: Prompt that it reads.
    """

    checkpoint: str
    pretrained: bool
    checkpoint_path: Path | None
    device: torch.device | str | None
    timestep: float
    prompt: str

    @property
    def folder(self) -> Path | None:
        """The folder with configs of its own, if ``checkpoint_path`` is one."""
        return self.checkpoint_path if self.checkpoint_path and self.checkpoint_path.is_dir() else None

    @property
    def arguments(self) -> str:
        """The arguments of ``create_model`` beside the recipe, as code."""
        if self.checkpoint_path:
            return f'"{self.checkpoint}", checkpoint_path="{self.checkpoint_path}"'
        return f'"{self.checkpoint}"' + (", pretrained=True" if self.pretrained else "")

    def build(self, activation_id: str) -> DiffusionBackbone:
        """The whole network with its weights, as a backbone of one activation."""
        return create_model(
            self.checkpoint,
            pretrained=self.pretrained and not self.checkpoint_path,
            checkpoint_path=self.checkpoint_path,
            recipe=[activation_id],
            timestep=self.timestep,
            prompt=self.prompt or None,
            device=self.device,
            truncate=False,
        )

    def build_empty(self, activation_id: str) -> DiffusionBackbone:
        """The same on ``meta``, without weights."""
        return create_model(
            self.checkpoint, checkpoint_path=self.folder, recipe=[activation_id], device="meta", truncate=False
        )


@dataclass(frozen=True)
class Settings:
    """How a selection is made; :func:`~diffusion_backbones.selection.run.select` explains each setting."""

    network: Network
    ids: tuple[str, ...]
    rules: tuple[Rule, ...]
    everything: bool
    draws: int
    properties_from: int
    budget: Budget
    seed: int
    treatment: Treatment


@dataclass(frozen=True)
class Prepared:
    """The candidates of a selection, and what is known of them before they are measured.

    Attributes:
        checkpoint, configs: The network.
        sites: The candidates, in forward order.
        images: (3, S, S) each: the images that properties are measured on.
        costs: Id -> cost of the network up to that activation.
        budget: The most that the choice may cost.
        named: Id -> the rule that drops it whatever is measured, or "".
        blank: The whole network on ``meta``.
        last: Id of the network's last activation.
    """

    checkpoint: Checkpoint
    configs: Configs
    sites: tuple[Site, ...]
    images: list[Tensor]
    costs: dict[str, PrefixCost]
    budget: Budget
    named: dict[str, str]
    blank: DiffusionBackbone
    last: str

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the candidates."""
        return [site.id for site in self.sites]

    @property
    def size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.images[0].shape[-1])

    def check_affordable(self, dropped: dict[str, str]) -> list[Site]:
        """The sites that are not dropped, or all if none is left.

        Raises:
            ValueError: Not one of them fits the budget.
        """
        kept = [site for site in self.sites if not dropped[site.id]]
        self.budget.affordable(kept or self.sites)
        return kept

    def estimate(self, draws: int, task: Task) -> str:
        """What the selection will cost at most, in words."""
        recipe = replace(self.blank.declaration.recipe, input_size=self.size)
        one = costs.measure(replace(self.blank.declaration, recipe=recipe), self.blank.configs)
        images, seen = len(self.images), sum(len(view) for view in task.views)
        compared = [site for site in self.sites if not self.named[site.id]]
        denoiser = number(one.denoiser_gflops * (draws * images + seen) / 1000)
        encoder = number(one.encoder_gflops * (images + seen) / 1000)
        disk = number(sum(task.cached_bytes(site.channels) for site in compared) / 1e9)
        return (
            f"{images} images x {draws} noise draws and {len(task.views)} views: {denoiser} TFLOPs in the denoiser, "
            f"{encoder} in the image encoder, and at most {disk} GB on the disk"
        )


def prepare(settings: Settings, data: Data) -> Prepared:
    """Find the candidates and check everything that can be checked without weights.

    Raises:
        KeyError: The checkpoint is unknown.
        FileNotFoundError: The folder holds no diffusion network.
        ValueError: There are too few images or they have a size that the network does not take, the rules drop
            everything, or nothing fits the budget.
    """
    checkpoint, network = architecture(settings.network.checkpoint, settings.network.folder)
    every = candidates(network.catalogue[name] for name in network.catalogue)
    last = every[-1].id
    blank = settings.network.build_empty(last)
    sites = tuple(matching(every, settings.ids))
    ids = [site.id for site in sites]
    images = data.images[: settings.properties_from]
    check_images(images, blank.size_divisibility, minimum=FEWEST)
    named = _named(settings, ids)
    filtering.check_some_kept(named)
    found = prefix_costs(blank, ids, int(images[0].shape[-1]))
    budget = replace(settings.budget, costs={name: cost.gflops for name, cost in found.items()})
    prepared = Prepared(checkpoint, network.configs, sites, images, found, budget, named, blank, last)
    prepared.check_affordable(named)
    return prepared


def _named(settings: Settings, ids: Sequence[str]) -> dict[str, str]:
    return dict.fromkeys(ids, "") if settings.everything else filtering.by_name(settings.rules, ids)
