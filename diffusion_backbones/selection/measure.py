"""Every activation of a network on a few images: its properties, in one pass for an image and its noise draws."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.selection.properties import Moments, Properties, Redundancy
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.validation import closest

FEWEST = 4
"""Images that properties can be told from: fewer do not tell a place's share from an image's."""
EVERY = 120.0
"""Seconds after which the sums are written down, so that a killed run loses no more. Those of a large network are
gigabytes.
"""


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
    """Of a network's activations those that can stand in a level by themselves: maps and tokens of the denoiser, no
    attention maps.
    """
    return [site for site in sites if not site.encoder and site.layout in ("map", "tokens")]


def matching(sites: Iterable[Site], patterns: Sequence[str]) -> list[Site]:
    """Those whose id matches one of some shell-style patterns.

    Raises:
        ValueError: A pattern that matches none; the closest ids are named.
    """
    sites = list(sites)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(site.id, pattern) for site in sites):
            raise ValueError(
                f"no activation that can be a level matches {pattern!r}.{closest(pattern, [site.id for site in sites])}"
            )
    return [site for site in sites if any(fnmatch.fnmatchcase(site.id, pattern) for pattern in patterns)]


@torch.no_grad()
def measure(
    backbone: DiffusionBackbone,
    images: Sequence[Tensor],
    ids: Sequence[str],
    *,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    state: Path | None = None,
    key: str = "",
) -> Measured:
    """The properties of activations, streamed: one image at a time, and of its activations one at a time.

    Args:
        backbone: A network that computes all ``ids``, at the timestep that they are to be judged at.
        images: (3, S, S) each, all of one size, a multiple of the backbone's ``size_divisibility``, in [-1, 1]; at
            least four.
        ids: Activation ids; see :func:`candidates`.
        draws: Noise draws for every image, at least 2.
        seed: Of the noise.
        progress: Wraps the images, such as ``tqdm``.
        state: A file for the sums so far, written every :data:`EVERY` seconds: a run that was killed goes on from it.
        key: Of the run; a state with another one is not used.

    Raises:
        ValueError: Too few images or draws, images of other sizes, or no ids.
        KeyError: An id that the network does not compute.
    """
    check(images, backbone.size_divisibility, minimum=FEWEST)
    if not ids:
        raise ValueError("no activation ids to measure")
    size = images[0].shape[-1]
    device = next(backbone.denoiser.parameters()).device
    sums = _Sums({id: Moments(size, seed) for id in ids}, Redundancy(), torch.Generator().manual_seed(seed))
    if state:
        sums.restore(state, key, device)
    written = time.monotonic()
    for image in progress(images[sums.images :]):
        z = backbone.encode(image[None].to(device))
        noise = torch.randn((draws, *z.shape[1:]), generator=sums.generator).to(z)
        places: dict[str, Tensor] = {}

        def look(site: Site, act: Tensor, places: dict[str, Tensor] = places) -> None:
            places[site.id] = sums.moments[site.id].add(act)

        backbone.visit_activations(None, ids, look, latents=z.expand(draws, -1, -1, -1), noise=noise)
        sums.redundancy.add([places[id] for id in ids])
        if state and time.monotonic() - written > EVERY and sums.images < len(images):
            sums.save(state, key)
            written = time.monotonic()
    return Measured({id: sums.moments[id].properties() for id in ids}, sums.redundancy.matrix(), len(images), draws)


@dataclass
class _Sums:
    """All that is carried from one image to the next; a file can hold it."""

    moments: dict[str, Moments]
    redundancy: Redundancy
    generator: torch.Generator

    @property
    def images(self) -> int:
        return next(iter(self.moments.values())).images

    def save(self, path: Path, key: str) -> None:
        moments = {
            id: {"sums": moment.sums, "images": moment.images, "draws": moment.draws}
            for id, moment in self.moments.items()
        }
        new = path.with_suffix(".new")
        torch.save(
            {
                "key": key,
                "moments": moments,
                "redundancy": self.redundancy.total,
                "generator": self.generator.get_state(),
            },
            new,
        )
        new.replace(path)

    def restore(self, path: Path, key: str, device: torch.device) -> None:
        """Go on from a file, if there is one of this run."""
        if not path.is_file():
            return
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["key"] != key:
            return
        for id, moment in self.moments.items():
            vars(moment).update(saved["moments"][id])
        self.redundancy = Redundancy(saved["redundancy"])
        self.generator.set_state(saved["generator"].cpu())


def check(images: Sequence[Tensor], divisibility: int, minimum: int) -> None:
    """Raise ``ValueError`` unless there are ``minimum`` images, all square, of one size and a multiple of
    ``divisibility``.
    """
    if len(images) < minimum:
        raise ValueError(
            f"{minimum} images are the least that this can be measured on, a few dozen are better; got {len(images)}"
        )
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images must be of one size, got {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or shape[1] % divisibility:
        raise ValueError(f"images must be (3, S, S) with S a multiple of {divisibility}, got {shape}")
