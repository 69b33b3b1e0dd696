"""Measure the properties of every activation of a network on a few images, in one pass for an image and its draws."""

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
from diffusion_backbones.ops import atomic
from diffusion_backbones.selection.properties import Moments, Properties, Redundancy
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.validation import closest

FEWEST = 4
"""Least number of images: fewer do not separate the share of the place from that of the image."""
EVERY = 120.0
"""Seconds after which the sums are saved, so that a killed run loses no more; a large network has gigabytes of them."""


@dataclass(frozen=True)
class Measured:
    """The properties of a network's activations.

    Attributes:
        properties: Id -> properties, in forward order.
        redundancy: (N, N) linear CKA between them, in that order.
        images, draws: Number of images, and of noise draws for each.
    """

    properties: dict[str, Properties]
    redundancy: Tensor
    images: int
    draws: int


def candidates(sites: Iterable[Site]) -> list[Site]:
    """The activations that can be a level by themselves: maps and tokens of the denoiser, without attention maps."""
    return [site for site in sites if not site.encoder and site.layout in ("map", "tokens")]


def matching(sites: Iterable[Site], patterns: Sequence[str]) -> list[Site]:
    """The sites whose id matches one of the shell-style patterns.

    Raises:
        ValueError: A pattern matches none; the error names the closest ids.
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
    treat: Callable[[Site, Tensor], Tensor] = lambda _, act: act,
) -> Measured:
    """The properties of activations, streamed: one image at a time, and of its activations one at a time.

    Args:
        backbone: A network that computes all ``ids``, at the timestep of interest.
        images: (3, S, S) each, all of one size, a multiple of the backbone's ``size_divisibility``, in [-1, 1]; at
            least four.
        ids: Activation ids; see :func:`candidates`.
        draws: Noise draws for every image, at least 2.
        seed: Seed of the noise.
        progress: Wraps the images, such as ``tqdm``.
        state: A file for the sums so far, written every :data:`EVERY` seconds; a killed run resumes from it.
        key: Key of the run; a state with another key is not used.
        treat: What is done to every activation before it is measured.

    Raises:
        ValueError: There are too few images or draws, images of different sizes, or no ids.
        KeyError: The network does not compute an id.
    """
    check_images(images, backbone.size_divisibility, minimum=FEWEST)
    if not ids:
        raise ValueError("no activation ids to measure")
    size = images[0].shape[-1]
    device = backbone.device
    sums = _Sums({name: Moments(size, seed) for name in ids}, Redundancy(), torch.Generator().manual_seed(seed))
    if state:
        sums.restore(state, key, device)
    written = time.monotonic()
    for image in progress(images[sums.images :]):
        z = backbone.encode(image[None].to(device))
        noise = torch.randn((draws, *z.shape[1:]), generator=sums.generator).to(z)
        places: dict[str, Tensor] = {}

        def add(site: Site, act: Tensor, places: dict[str, Tensor] = places) -> None:
            places[site.id] = sums.moments[site.id].add(treat(site, act))

        backbone.visit_activations(None, ids, add, latents=z.expand(draws, -1, -1, -1), noise=noise)
        sums.redundancy.add([places[name] for name in ids])
        if state and time.monotonic() - written > EVERY and sums.images < len(images):
            sums.save(state, key)
            written = time.monotonic()
    properties = {name: sums.moments[name].properties() for name in ids}
    return Measured(properties, sums.redundancy.matrix(), len(images), draws)


@dataclass
class _Sums:
    """The running sums over images; they can be saved to a file."""

    moments: dict[str, Moments]
    redundancy: Redundancy
    generator: torch.Generator

    @property
    def images(self) -> int:
        return next(iter(self.moments.values())).images

    def save(self, path: Path, key: str) -> None:
        moments = {
            name: {"sums": moment.sums, "images": moment.images, "draws": moment.draws}
            for name, moment in self.moments.items()
        }
        state = {
            "key": key,
            "moments": moments,
            "redundancy": self.redundancy.total,
            "generator": self.generator.get_state(),
        }
        with atomic.replacing(path) as part:
            torch.save(state, part)

    def restore(self, path: Path, key: str, device: torch.device) -> None:
        """Resume from a file, if there is one with this key."""
        if not path.is_file():
            return
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["key"] != key:
            return
        for name, moment in self.moments.items():
            vars(moment).update(saved["moments"][name])
        self.redundancy = Redundancy(saved["redundancy"])
        self.generator.set_state(saved["generator"].cpu())


def check_images(images: Sequence[Tensor], divisibility: int, minimum: int) -> None:
    """Raise ``ValueError`` unless there are ``minimum`` images, all square, of one size, a multiple of
    ``divisibility``.
    """
    if len(images) < minimum:
        raise ValueError(
            f"properties are measured on at least {minimum} images, better on a few dozen; got {len(images)}"
        )
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images must have one size, got {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or shape[1] % divisibility:
        raise ValueError(f"images must be (3, S, S) with S a multiple of {divisibility}, got {shape}")
