"""Every activation of a network on a few images: its properties, in one pass for an image and its noise draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.activations import Site
from diffusion_backbones.backbone import DiffusionBackbone
from diffusion_backbones.selection.properties import Moments, Properties, Redundancy


@dataclass(frozen=True)
class Measured:
    """What the images say of a network.

    Attributes:
        properties: By activation id, in forward order.
        redundancy: (N, N) linear CKA between them, in that order.
        images, draws: How many were looked at.
    """

    properties: dict[str, Properties]
    redundancy: Tensor
    images: int
    draws: int


def candidates(sites: Iterable[Site]) -> list[Site]:
    """Of a network's activations those that can stand in a level by themselves: maps and tokens of the denoiser, no attention maps."""
    return [site for site in sites if not site.encoder and site.layout in ("map", "tokens")]


@torch.no_grad()
def measure(
    backbone: DiffusionBackbone,
    images: Sequence[Tensor],
    ids: Sequence[str],
    *,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Measured:
    """The properties of activations, streamed: one image at a time, and of its activations one at a time.

    Args:
        backbone: A network that computes all ``ids``, at the timestep that they are to be judged at.
        images: (3, S, S) each, all of one size, a multiple of the backbone's ``size_divisibility``, in [-1, 1]; at least four.
        ids: Activation ids; see :func:`candidates`.
        draws: Noise draws for every image, at least 2.
        seed: Of the noise.
        progress: Wraps the images, such as ``tqdm``.

    Raises:
        ValueError: Too few images or draws, images of other sizes, or no ids.
        KeyError: An id that the network does not compute.
    """
    check(images, backbone.size_divisibility, minimum=4)
    if not ids:
        raise ValueError("no activation ids to measure")
    size = images[0].shape[-1]
    moments = {id: Moments(size, seed) for id in ids}
    redundancy = Redundancy()
    generator = torch.Generator().manual_seed(seed)
    device = next(backbone.denoiser.parameters()).device
    for image in progress(images):
        z = backbone.encode(image[None].to(device))
        noise = torch.randn((draws, *z.shape[1:]), generator=generator).to(z)
        places: dict[str, Tensor] = {}

        def look(site: Site, act: Tensor, places: dict[str, Tensor] = places) -> None:
            places[site.id] = moments[site.id].add(act)

        backbone.visit_activations(None, ids, look, latents=z.expand(draws, -1, -1, -1), noise=noise)
        redundancy.add([places[id] for id in ids])
    return Measured({id: moments[id].properties() for id in ids}, redundancy.matrix(), len(images), draws)


def check(images: Sequence[Tensor], divisibility: int, minimum: int) -> None:
    """Raise ``ValueError`` unless there are ``minimum`` images, all square, of one size and a multiple of ``divisibility``."""
    if len(images) < minimum:
        raise ValueError(f"{minimum} images are the least that this can be measured on, a few dozen are better; got {len(images)}")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images must be of one size, got {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or shape[1] % divisibility:
        raise ValueError(f"images must be (3, S, S) with S a multiple of {divisibility}, got {shape}")
