"""What a recipe does to an activation behind the network: drop massive channels, normalize, modulate.

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


def unit(x: Tensor, dim: int) -> Tensor:
    """Vectors along an axis divided by their length, which is taken in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim).to(x.dtype)


def apply(recipe: Recipe, sites: Sequence[Site], acts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Postprocess ``sites`` as the recipe says.

    Args:
        recipe: Which channels are discarded, and how the rest is normalized.
        sites: In the denoiser.
        acts: Id -> activation, averaged over the ensemble, of ``sites`` and of their modulation sites.

    Returns:
        Id -> activation, with shape and dtype as before.
    """
    return {site.id: _apply(recipe, site, acts) for site in sites}


def _apply(recipe: Recipe, site: Site, acts: Mapping[str, Tensor]) -> Tensor:
    x, discarded = acts[site.id], recipe.discarded(site.id)
    if not discarded and recipe.normalize == "none":
        return x
    x = x.movedim(1, -1) if site.layout == "map" else x
    if discarded:
        x = x.index_fill(-1, torch.tensor(discarded, device=x.device), 0)
    if recipe.normalize == "l2":
        x = unit(x, -1)
    elif recipe.normalize != "none":
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if recipe.normalize == "adaptive":
        both, c = acts[site.modulation_site.id][:, None], site.channels
        x = x * (1 + both[..., c : 2 * c]) + both[..., :c]
    return x.movedim(-1, 1) if site.layout == "map" else x
