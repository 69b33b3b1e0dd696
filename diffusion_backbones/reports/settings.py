"""The settings of a recipe in words, as cards and ``info`` say them. Nothing here needs torch."""

from __future__ import annotations

from itertools import pairwise

from diffusion_backbones.spec import discard
from diffusion_backbones.spec.configs import Config
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.schedule import noise_level

_COMBINED = {"mean": "averaged", "concatenate": "concatenated"}
_POSTPROCESSING = {
    "layer": "LayerNorm over channels",
    "adaptive": "LayerNorm over channels, with the shift and scale that the next block of the network gives it",
    "l2": "length 1 at every place",
}


def times(passes: int) -> str:
    """``8 × ``, the factor in front of the cost of one pass; empty for one pass."""
    return f"{passes} × " if passes > 1 else ""


def timesteps(recipe: Recipe) -> str:
    """``50``, or ``50, 150, 250, concatenated``, or ``20, 40 ... 620 (31), averaged``: what the network receives."""
    several = [f"{t:g}" for t in recipe.all_timesteps]
    if len(several) == 1:
        return several[0]
    steps = {b - a for a, b in pairwise(recipe.all_timesteps)}
    short = len(several) > 4 and len(steps) == 1
    said = f"{several[0]}, {several[1]} ... {several[-1]} ({len(several)})" if short else ", ".join(several)
    return f"{said}, {_COMBINED[recipe.combine]}"


def postprocessing(recipe: Recipe) -> str:
    """The operations on the activations behind the network, or empty."""
    said = [_discarded(recipe), _POSTPROCESSING.get(recipe.normalize, "")]
    if recipe.debias:
        said.append(f"{recipe.debias} directions of position taken out of every level, then length 1 at every place")
    if recipe.components:
        said.append(f"every level reduced to {recipe.components} principal components, fitted on images")
    return "; ".join(filter(None, said))


def _discarded(recipe: Recipe) -> str:
    if recipe.discard == discard.AUTO:
        return (
            f"channels with more than {discard.MASSIVE:g} times the root mean square of the median one set to zero, "
            "which are found on a calibration image when it is built with weights"
        )
    if each := discard.by_activation(recipe.discard):
        said = [f"{', '.join(map(str, channels))} of {name}" for name, channels in each.items() if channels]
        return f"channels {'; '.join(said)} set to zero" if said else "no channel is massive, and none set to zero"
    return f"channels {', '.join(map(str, recipe.discard))} set to zero" if recipe.discard else ""


def noise(recipe: Recipe, scheduler: Config) -> str:
    """The noise levels of the first and the last timestep, and how noise is drawn."""
    if recipe.noise == "none":
        return "none: z_t = z"
    if recipe.noise == "inversion":
        return f"z_t by DDIM inversion, of {recipe.inversion_steps} steps over the whole schedule those that lead there"
    fixed, n = recipe.noise == "fixed", recipe.ensemble
    ends = dict.fromkeys((recipe.all_timesteps[0], recipe.all_timesteps[-1]))
    levels = [noise_level(scheduler, t) for t in ends]
    mixed = " to ".join(f"{alpha:.4f} z + {sigma:.4f} noise" for alpha, sigma in levels)
    drawn = f"one fixed canvas, seed {recipe.seed}" if fixed else "drawn anew in every call"
    if n > 1:
        of = f"fixed canvases, seeds {recipe.seed} to {recipe.seed + n - 1}" if fixed else "draws, new in every call"
        drawn = f"activations averaged over {n} {of}"
    return f"z_t = {mixed}; {drawn}{', the same at every timestep' if len(ends) > 1 else ''}"
