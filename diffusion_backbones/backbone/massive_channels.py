"""Massive channels of a built network: found once, and then part of its recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone import pipeline
from diffusion_backbones.backbone.call_arguments import Call
from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.ops.calibration_image import calibration_image
from diffusion_backbones.ops.fusing import reformat
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.discard import AUTO, MASSIVE
from diffusion_backbones.spec.input_format import SYMMETRIC


def find(backbone: BackboneState) -> None:
    """Put the channels that ``discard="auto"`` means for these weights in its place, and say so in the recipe's notes;
    nothing is done for other recipes.
    """
    declaration, side = backbone.declaration, backbone.plan.size
    if declaration.recipe.discard != AUTO:
        return
    found = massive(backbone, calibration_image(side))
    note = (
        f"The channels that are set to zero have more than {MASSIVE:g} times the root mean square of the median one, "
        f"on the calibration image of this package at {side} x {side} pixels."
    )
    recipe = declaration.recipe.override(discard={**found}, notes=(*declaration.recipe.notes, note))
    backbone.plan = replace(backbone.plan, declaration=replace(declaration, recipe=recipe))


@torch.no_grad()
def massive(backbone: BackboneState, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Activation id -> its massive channels in one image, over all places and timesteps together.

    Args:
        backbone: On any device but ``meta``.
        image: (1, 3, H, W) in [-1, 1].
    """
    sites = [site for site in backbone.plan.sites if not site.encoder]
    call = replace(own_call(backbone), combine="mean")
    latents = pipeline.start(backbone, as_input(backbone, image), call, [])

    def squares(acts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {site.id: mean_square(site, acts[site.id]) for site in sites}

    found = pipeline.activations(backbone, latents, call, sites, postprocess=squares)
    return {name: beyond(square[0].sqrt()) for name, square in found.items()}


def own_call(backbone: BackboneState) -> Call:
    """A call as the recipe says; noise that is random there is drawn with the recipe's seed."""
    recipe, given = backbone.declaration.recipe, dict[str, Any]()
    if recipe.noise == "random":
        given["generator"] = torch.Generator().manual_seed(recipe.seed)
    return Call.parse(given, recipe, backbone.chunk, backbone.declaration.name, backbone.folded)


def as_input(backbone: BackboneState, image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] as the backbone takes images."""
    return reformat(image, SYMMETRIC, backbone.input_format).to(backbone.device)


def mean_square(site: Site, act: Tensor) -> Tensor:
    """(B, C) mean over places of an activation's squares, in float32 at least."""
    places = (2, 3) if site.layout == "map" else (1,)
    return act.to(torch.promote_types(act.dtype, torch.float32)).square().mean(places)


def beyond(rms: Tensor) -> tuple[int, ...]:
    """The massive channels, by the root mean square of each."""
    return tuple((rms > MASSIVE * rms.median()).nonzero().flatten().tolist())
