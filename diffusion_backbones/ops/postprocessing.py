"""What a recipe does to an activation behind the network: drop massive channels, normalise, modulate.

The residual stream of a large diffusion transformer is dominated by a few huge channels; Gan et al. (DiTF, arXiv
2505.18584) set them to zero and apply the adaptive LayerNorm of the block that would read the stream next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.recipe import Recipe


def check_postprocessing(recipe: Recipe, sites: Sequence[Site]) -> None:
    """Raise ``ValueError`` if the recipe asks for what an activation does not have."""
    for site in sites:
        if recipe.discard and max(recipe.discard) >= site.channels:
            raise ValueError(
                f"recipe {recipe.name!r}: discard={recipe.discard}, and {site.id} has channels 0 to {site.channels - 1}"
            )
        if recipe.normalise == "adaptive" and not site.modulation:
            raise ValueError(
                f"recipe {recipe.name!r}: normalise='adaptive' needs a block with an adaptive LayerNorm behind the "
                "activation, and there is none behind "
                f"{site.id}; take the output of another transformer block, or normalise='layer'"
            )


def needed(recipe: Recipe, sites: Sequence[Site]) -> list[Site]:
    """Of the sites those in the denoiser, and what else must be recorded there for the post-operation."""
    sites = [site for site in sites if not site.encoder]
    return [*sites, *map(_modulation, sites)] if recipe.normalise == "adaptive" else sites


def apply(recipe: Recipe, sites: Sequence[Site], acts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Activations of :func:`needed`, averaged over the ensemble -> those of ``sites`` as the recipe wants them, same
    shapes and dtype.
    """
    return {site.id: _apply(recipe, site, acts) for site in sites}


def _apply(recipe: Recipe, site: Site, acts: Mapping[str, Tensor]) -> Tensor:
    x = acts[site.id]
    if not recipe.discard and recipe.normalise == "none":
        return x
    x = x.movedim(1, -1) if site.layout == "map" else x
    if recipe.discard:
        x = x.index_fill(-1, torch.tensor(recipe.discard, device=x.device), 0)
    if recipe.normalise != "none":
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if recipe.normalise == "adaptive":
        both, c = acts[_modulation(site).id][:, None], site.channels
        x = x * (1 + both[..., c : 2 * c]) + both[..., :c]
    return x.movedim(-1, 1) if site.layout == "map" else x


def _modulation(site: Site) -> Site:
    return Site(f"{site.id}|modulation", site.modulation, "out", site.channels, site.stride, "vector")
