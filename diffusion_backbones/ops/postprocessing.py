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
    x = acts[site.id]
    if not recipe.discard and recipe.normalize == "none":
        return x
    x = x.movedim(1, -1) if site.layout == "map" else x
    if recipe.discard:
        x = x.index_fill(-1, torch.tensor(recipe.discard, device=x.device), 0)
    if recipe.normalize != "none":
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if recipe.normalize == "adaptive":
        both, c = acts[site.modulation_site.id][:, None], site.channels
        x = x * (1 + both[..., c : 2 * c]) + both[..., :c]
    return x.movedim(-1, 1) if site.layout == "map" else x
