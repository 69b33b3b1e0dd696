"""A declaration: a checkpoint read by a recipe, under a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.recipe import Recipe


@dataclass(frozen=True)
class Declaration:
    """A backbone: a checkpoint read by a recipe, under a name."""

    name: str
    checkpoint: Checkpoint
    recipe: Recipe

    @property
    def architecture(self) -> str:
        """The name without its tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The part of the name behind the dot, or empty."""
        return self.name.partition(".")[2]

    @property
    def title(self) -> str:
        """Name for people."""
        return self.checkpoint.title

    @property
    def checkpoint_name(self) -> str:
        """What names its weights."""
        return self.checkpoint.name

    @property
    def license(self) -> License:
        """The licence of its weights."""
        return self.checkpoint.license

    @property
    def digest(self) -> str:
        """Of its recipe."""
        return self.recipe.digest

    @property
    def prompt(self) -> str:
        """Of its recipe."""
        return self.recipe.prompt

    @property
    def timestep(self) -> float:
        """Of its recipe; the first of several."""
        return self.recipe.timestep

    def described(self) -> dict[str, Any]:
        """Its recipe, JSON-able."""
        return self.recipe.to_dict()

    @property
    def input_size(self) -> int:
        """Side in pixels that the source of the recipe used, or the checkpoint's own."""
        return self.recipe.input_size or self.checkpoint.input_size


def pretrained_cfg(declaration: Declaration, input_format: InputFormat = SYMMETRIC) -> dict[str, Any]:
    """The keys that ``timm.data.resolve_model_data_config`` and timm's hub code read.

    Images are normalized with mean = std = 0.5, that is to [-1, 1], unless another format is given; the size is the
    recipe's.
    """
    checkpoint, size = declaration.checkpoint, declaration.input_size
    return {
        "architecture": declaration.architecture,
        "tag": declaration.tag,
        "hf_hub_id": checkpoint.hub_id or None,
        "custom_load": True,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": input_format.mean,
        "std": input_format.std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": None,
        "classifier": None,
        "license": str(checkpoint.license),
        "origin_url": f"https://huggingface.co/{checkpoint.hub_id}" if checkpoint.hub_id else None,
        "paper_ids": [f"arXiv:{p.arxiv}" for p in (declaration.recipe.paper, checkpoint.paper) if p and p.arxiv],
    }
