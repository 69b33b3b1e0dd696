"""What a recipe leaves to be found: massive channels and directions of position by weights, components by images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone import massive_channels, pipeline
from diffusion_backbones.backbone.call_arguments import Call
from diffusion_backbones.backbone.massive_channels import as_input, own_call
from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.ops.positional_basis import PositionalBasis
from diffusion_backbones.ops.principal_components import Moments, PrincipalComponents


def find(backbone: BackboneState) -> None:
    """Find what depends on the weights alone, unless it is found: massive channels, and then directions of position.

    Raises:
        ValueError: A level has too few places for the directions.
    """
    massive_channels.find(backbone)
    waiting = [(i, part) for i, part in _parts(backbone) if isinstance(part, PositionalBasis) and not part.is_fitted]
    if waiting:
        side = backbone.plan.size
        one_color = as_input(backbone, torch.zeros(1, 3, side, side))
        maps = _levels(backbone, one_color, own_call(backbone), [i for i, _ in waiting])
        for i, part in waiting:
            part.find(maps[i])


def fit(backbone: BackboneState, images: Tensor | Iterable[Tensor] | None, call: Call) -> None:
    """Find what is missing, and fit the principal components of every level on images together.

    Raises:
        ValueError: Images without components or the other way round, or too few places; a fit before stays then.
    """
    name = backbone.declaration.name
    if backbone.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values to fit anything on; build it on another")
    find(backbone)
    waiting = {i: part for i, part in _parts(backbone) if not isinstance(part, PositionalBasis)}
    if images is None:
        if waiting:
            raise ValueError(f"{name} has components, which are fitted on images; give some, as a call takes them")
        return
    if not waiting:
        raise ValueError(f"{name} has no components to fit on images; build it with components=")
    moments = {i: Moments(part.mean.numel()) for i, part in waiting.items()}
    for batch in [images] if isinstance(images, Tensor) else images:
        for i, m in _levels(backbone, batch, call, list(waiting)).items():
            before = [part for at, part in _parts(backbone) if at == i and isinstance(part, PositionalBasis)]
            moments[i].add(nn.Sequential(*before)(m))
    found = {i: part.solve(moments[i]) for i, part in waiting.items()}  # all of them, before one is changed
    for i, part in waiting.items():
        part.take(*found[i])


def _parts(backbone: BackboneState) -> Iterator[tuple[int, PrincipalComponents]]:
    """(Position of a level, what is fitted of it), in the order in which they are applied."""
    for i, level in enumerate(backbone.levels):
        yield from ((i, part) for part in backbone.fits_of(level))


@torch.no_grad()
def _levels(backbone: BackboneState, x: Tensor, call: Call, wanted: list[int]) -> dict[int, Tensor]:
    sites = [site for i in wanted for site in backbone.levels[i].sites]
    return pipeline.levels(backbone, pipeline.start(backbone, x, call, sites), call, wanted)
