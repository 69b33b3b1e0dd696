"""The properties of an activation, measured: noise, position, locality, granularity, massive channels, redundancy.

Meng et al. (GDF, https://arxiv.org/abs/2410.03558, section 4) describe three properties of the activations of diffusion
U-Nets by looking at pictures: asymmetric diffusion noise, granularity that changes inside one resolution, and locality
without positional embeddings. Here each is a number. ``docs/selection.md`` gives the formulas.

Images come one at a time, each with several noise draws, and only sums are kept: the memory does not grow with their
number.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

LOW = 4.0
"""Cycles per image below which a frequency counts as low."""
PROBED = 128
"""Number of channels after the random projection of wide activations, for linear readouts and similarities."""
GRID = 16
"""Number of places along a side at which similarities are compared."""


@dataclass(frozen=True)
class Properties:
    """The properties of one activation.

    Attributes:
        noise: Share of the variance that the noise draw explains, 0 to 1, averaged over channels.
        noise_low: The same share for frequencies below :data:`LOW` cycles per image.
        noise_bands: The same share octave by octave: 0 to 1 cycles per image, 1 to 2, 2 to 4 ... None if the grid has
            no such frequency.
        position: Share of the variance that the place in the image explains, whatever the image and the draw, 0 to 1.
        xy: R² of a linear readout of x and y on images that it was not fitted to, at most 1; below 0 is worse than a
            guess.
        locality: Share of the variance of the similarity between two places of an image that their distance explains, 0
            to 1.
        granularity: Half a wavelength at the mean frequency of what the image explains, in pixels of the image.
        massive: Root mean square of the strongest channel, divided by that of the median channel.
        similarity: (distance in pixels, mean cosine similarity) of two places of an image, near to far.
    """

    noise: float
    noise_low: float
    noise_bands: tuple[float | None, ...]
    position: float
    xy: float
    locality: float
    granularity: float
    massive: float
    similarity: tuple[tuple[float, float], ...]

    @property
    def noise_curve(self) -> list[tuple[float, float]]:
        """(lower end of the octave in cycles per image, share of noise) for the octaves that the grid has."""
        ends = (0.0, *(2.0**i for i in range(len(self.noise_bands) - 1)))
        return [(low, share) for low, share in zip(ends, self.noise_bands, strict=True) if share is not None]


def cosine_basis(n: int) -> Tensor:
    """The matrix (n, n) of the orthonormal cosine transform (DCT-II) of n places: row k has k / 2 cycles."""
    k, i = torch.arange(n)[:, None], torch.arange(n)[None]
    basis = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def radii(height: int, width: int) -> Tensor:
    """(height · width,) number of half cycles per image, rounded down, of every coefficient of a cosine transform."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return (rows**2 + columns**2).sqrt().long().flatten()


@dataclass
class Moments:
    """Running sums of one activation over images.

    Args:
        size: Side in pixels of the square images.
        seed: Seed of the random projection.
        images, draws: Number of images that were added, and of draws in each.
        sums: The sums, by name.
    """

    size: int
    seed: int = 0
    images: int = 0
    draws: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> Tensor:
        """Add one image.

        Args:
            x: (draws, C, h, w), two or more draws of noise on one image, equally many for every image.

        Returns:
            (GRID², PROBED or C): the mean over draws on a grid, each channel standardised in the image, to compare with
            other activations.

        Raises:
            ValueError: There are fewer than two draws.
        """
        if len(x) < 2:
            raise ValueError(f"noise is measured between draws, at least 2 an image; got {len(x)}")
        x = x.detach().float()
        self.draws = len(x)
        self._add_spectra(x)
        mean = x.mean(0)
        standard = (mean - mean.mean((1, 2), keepdim=True)) / mean.std((1, 2), correction=0, keepdim=True).clamp(
            min=1e-12
        )
        side = min(GRID, *x.shape[-2:])
        own = self._project(F.adaptive_avg_pool2d(standard, side).flatten(1).T)
        self._add_readout(own, side)
        self._add_similarity(own, side)
        self.images += 1
        if side == GRID:
            return own
        return F.interpolate(own.T.reshape(1, -1, side, side), (GRID, GRID), mode="bilinear")[0].flatten(1).T

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_spectra(self, x: Tensor) -> None:
        _, channels, h, w = x.shape
        coefficients = cosine_basis(h).to(x) @ x @ cosine_basis(w).to(x).T
        mean, bins = coefficients.mean(0), radii(h, w).to(x.device)

        def binned(energy: Tensor) -> Tensor:
            return torch.zeros(channels, int(bins.max()) + 1, device=x.device).index_add_(1, bins, energy.flatten(1))

        self._sum("map", mean)
        self._sum("signal", binned(mean.square()))
        self._sum("noise", binned(coefficients.var(0)))
        self._sum("square", x.square().mean((0, 2, 3)))

    def _project(self, places: Tensor) -> Tensor:
        channels = places.shape[1]
        if channels <= PROBED:
            return places
        generator = torch.Generator().manual_seed(self.seed)
        return places @ torch.randn(channels, PROBED, generator=generator).to(places) / math.sqrt(PROBED)

    def _add_readout(self, places: Tensor, side: int) -> None:
        """Normal equations of x and y on the channels, separately for even and odd images."""
        ramp = (torch.arange(side).to(places) + 0.5) / side * 2 - 1
        target = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).flatten(0, 1)
        inputs, half = F.pad(places, (0, 1), value=1.0), self.images % 2
        self._sum(f"xx{half}", inputs.T @ inputs)
        self._sum(f"xy{half}", inputs.T @ target)
        self._sum(f"yy{half}", target.square().sum())

    def _add_similarity(self, places: Tensor, side: int) -> None:
        unit = F.normalize(places, dim=1)
        similarity, bins = (unit @ unit.T).flatten(), _distances(side).to(places.device)
        n = int(bins.max()) + 1
        self._sum("pairs", torch.bincount(bins, minlength=n).to(similarity))
        self._sum("cosine", torch.zeros(n, device=similarity.device).index_add_(0, bins, similarity))
        self._sum("cosine_square", torch.zeros(n, device=similarity.device).index_add_(0, bins, similarity.square()))

    def properties(self) -> Properties:
        """The properties that follow from the sums.

        Raises:
            ValueError: There are fewer than four images, too few to separate the share of the image from that of the
                place.
        """
        if self.images < 4:
            raise ValueError(
                f"separating the share of the place from that of the image takes at least 4 images; got {self.images}"
            )
        position, image, noise = self._shares()
        total = (position + image + noise).sum(1)
        alive = total > 1e-12 * total.max().clamp(min=1e-30)
        position, image, noise, total = position[alive], image[alive], noise[alive], total[alive]
        cycles = torch.arange(noise.shape[1], device=noise.device) / 2
        edges = [0.0, *(2.0**i for i in range(math.ceil(math.log2(max(float(cycles[-1]), 1))) + 1))]
        bands = [(cycles >= low) & (cycles < high) for low, high in itertools.pairwise(edges)]

        def noise_among(chosen: Tensor) -> float | None:
            inside = (position + image + noise)[:, chosen].sum(1)
            some = inside > 1e-12 * total
            return float((noise[:, chosen].sum(1)[some] / inside[some]).mean()) if bool(some.any()) else None

        spectrum = image[:, 1:] / image[:, 1:].sum(1, keepdim=True).clamp(min=1e-30)
        frequency = float((spectrum.mean(0) * cycles[1:]).sum() / spectrum.mean(0).sum().clamp(min=1e-30))
        rms = (self.sums["square"] / self.images).sqrt()
        curve, locality = self._similarity()
        return Properties(
            noise=float((noise.sum(1) / total).mean()),
            noise_low=noise_among(cycles < LOW) or 0.0,
            noise_bands=tuple(noise_among(band) for band in bands),
            position=float((position.sum(1) / total).mean()),
            xy=self._readout(),
            locality=locality,
            granularity=self.size / (2 * frequency) if frequency > 0 else float(self.size),
            massive=float(rms.max() / rms.median().clamp(min=1e-12)),
            similarity=curve,
        )

    def _shares(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C, K) each: the variance by place, by image and by draw at K frequencies, unbiased but for the clamp at
        zero.
        """
        n, bins = self.images, radii(*self.sums["map"].shape[1:]).to(self.sums["map"].device)
        noise, signal = self.sums["noise"] / n, self.sums["signal"]
        squared = torch.zeros_like(noise).index_add_(1, bins, (self.sums["map"] / n).square().flatten(1))
        residual = ((signal - n * squared) / (n - 1)).clamp(min=0)  # variance of the image and of the mean over draws
        position, image = (squared - residual / n).clamp(min=0), (residual - noise / self.draws).clamp(min=0)
        position[:, 0] = 0  # the channel mean carries no position
        return position, image, noise

    def _readout(self) -> float:
        """R² of ridge regression, mean of both directions: fitted to one half of the images, tested on the other."""
        scores = []
        for train, test in ((0, 1), (1, 0)):
            xx, n = self.sums[f"xx{train}"].double(), float(self.sums[f"xx{train}"][-1, -1])
            ridge = 1e-2 * n * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            ridge[-1, -1] = 0
            weights = torch.linalg.solve(xx + ridge, self.sums[f"xy{train}"].double())
            xx, xy, yy = (self.sums[f"{name}{test}"].double() for name in ("xx", "xy", "yy"))
            error = yy - 2 * (weights * xy).sum() + (weights * (xx @ weights)).sum()
            scores.append(1 - float(error / yy))
        return sum(scores) / 2

    def _similarity(self) -> tuple[tuple[tuple[float, float], ...], float]:
        """The curve, and the share of the variance of similarities that distance explains, without equal places."""
        count, total, square = (self.sums[name][1:].double() for name in ("pairs", "cosine", "cosine_square"))
        mean = total / count.clamp(min=1)
        overall = total.sum() / count.sum()
        between = (count * (mean - overall) ** 2).sum() / count.sum()
        whole = square.sum() / count.sum() - overall**2
        pixels = self.size / min(GRID, *self.sums["map"].shape[1:])
        curve = tuple((round(pixels * (i + 1), 2), round(float(m), 4)) for i, m in enumerate(mean) if count[i] > 0)
        return curve, float(between / whole.clamp(min=1e-12))


def _distances(side: int) -> Tensor:
    """(side⁴,) rounded distances between all pairs of places of a square grid."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1).float()
    return torch.cdist(at, at).round().long().flatten()


class Redundancy:
    """Linear CKA between activations, from the places of one image at a time.

    Kornblith et al., https://arxiv.org/abs/1905.00414, with the unbiased estimate of HSIC (Song et al. 2012, equation
    5; its U-centred form).
    """

    def __init__(self, total: Tensor | None = None) -> None:
        self.total = total

    def add(self, places: list[Tensor]) -> None:
        """Add one image: (P, C_i) for every activation, at the same P places."""
        grams = torch.stack([_centred(x @ x.T).flatten() for x in places])
        grams = grams / grams.norm(dim=1, keepdim=True).clamp(min=1e-12)  # images count alike
        self.total = grams @ grams.T + (0 if self.total is None else self.total)

    def matrix(self) -> Tensor:
        """(N, N): 1 for equal up to rotation and scale, about 0 for unrelated.

        Raises:
            ValueError: No image was added.
        """
        if self.total is None:
            raise ValueError("no image was added; call add() first")
        scale = self.total.diagonal().clamp(min=1e-12).sqrt()
        return self.total / scale[:, None] / scale[None]


def _centred(gram: Tensor) -> Tensor:
    n = len(gram)
    gram = gram.clone().fill_diagonal_(0)
    rows = gram.sum(0)
    out = gram - rows[:, None] / (n - 2) - rows[None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return out.fill_diagonal_(0)
