"""What activations are compared on: a label-scarce segmentation probe, and matched points.

A task looks at every activation of an image (or of a pair) once, keeps the little that its score needs (features at a
few hundred places, or the similarities of a few points), and then scores any set of activations from that: single ones
when they are compared, and their combinations when a recipe is chosen. The network does not run again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

POINTS = 400
"""Places of an image at which a segmentation probe reads features."""
FINEST = 64
"""Places along a side of the grid on which points are matched, at most."""
SPLITS = 3
"""How often a score is taken, each time on another draw of the same data."""


class Task(ABC):
    """Data, and a score for a set of activations.

    Attributes:
        metric: Its name; higher is better.
        looks: (B, 3, S, S) each, in [-1, 1]: the images that must be looked at together.
    """

    metric: str
    looks: Sequence[Tensor]

    @abstractmethod
    def reduce(self, index: int, act: Tensor) -> NDArray[np.float16]:
        """What the score needs of an activation of one look; equally shaped for all looks.

        Args:
            index: Which look.
            act: (B, C, h, w), a row for each image of the look.
        """

    @abstractmethod
    def kept(self, channels: int) -> int:
        """Bytes that :meth:`reduce` gives for an activation of so many channels, all looks together."""

    @abstractmethod
    def score(self, members: Sequence[NDArray[np.float16]]) -> NDArray[np.float64]:
        """(SPLITS,) scores of activations together.

        Args:
            members: What :meth:`reduce` gave for each activation, looks stacked: (looks, ...).
        """


class Segmentation(Task):
    """A linear probe on few labelled images: ridge regression on the classes from standardised features, all
    activations concatenated.

    Each split trains on another half of the images and is scored on the other half.

    Args:
        images: (3, S, S) each, in [-1, 1].
        masks: (S, S) each, whole numbers from 0; 255 is ignored.
        seed: Of places and splits.

    Raises:
        ValueError: Fewer than four images, not a mask for every image, of another size, or fewer than two classes.
    """

    metric = "mIoU"

    def __init__(self, images: Sequence[Tensor], masks: Sequence[NDArray[np.uint8]], seed: int = 0):
        if len(images) < 4:
            raise ValueError(
                "a probe is trained on one half of the images and scored on the other: give at least 4, got "
                f"{len(images)}"
            )
        if len(masks) != len(images):
            raise ValueError(f"every image needs a mask, got {len(images)} images and {len(masks)} masks")
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            if tuple(mask.shape) != tuple(image.shape[1:]):
                raise ValueError(
                    f"mask {i} is {mask.shape} and its image {tuple(image.shape[1:])}; they must be of one size"
                )
        self.looks, rng = [image[None] for image in images], np.random.default_rng(seed)
        size = images[0].shape[-1]
        self.places = rng.integers(0, size, (len(images), POINTS, 2))  # row, column
        labels = np.stack([mask[at[:, 0], at[:, 1]] for mask, at in zip(masks, self.places, strict=True)])
        self.classes = np.unique(labels[labels != 255])
        if len(self.classes) < 2:
            raise ValueError(
                f"a probe tells classes apart, and the masks hold {len(self.classes)}: {self.classes.tolist()}"
            )
        self.labels = labels
        self.splits = [rng.permutation(len(images)) < len(images) // 2 for _ in range(SPLITS)]

    def reduce(self, index: int, act: Tensor) -> NDArray[np.float16]:
        at = torch.from_numpy(self.places[index]).to(act.device).flip(1)
        grid = (at.float() + 0.5) / (self.looks[index].shape[-1] / 2) - 1
        read = F.grid_sample(act.float(), grid[None, None], align_corners=False, padding_mode="border")[0, :, 0]
        return read.T.cpu().numpy().astype(np.float16)

    def kept(self, channels: int) -> int:
        return 2 * len(self.looks) * POINTS * channels

    def score(self, members: Sequence[NDArray[np.float16]]) -> NDArray[np.float64]:
        features = np.concatenate(members, 2, dtype=np.float32)
        return np.array([self._probe(features, train) for train in self.splits])

    def _probe(self, features: NDArray[np.float32], train: NDArray[np.bool_]) -> float:
        from sklearn.linear_model import RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known, asked = (features[rows].reshape(-1, features.shape[-1]) for rows in (train, ~train))
        truth, expected = self.labels[train].ravel(), self.labels[~train].ravel()
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100.0))
        probe.fit(known[truth != 255], truth[truth != 255])
        return mean_iou(expected, probe.predict(asked), self.classes)


def mean_iou(truth: NDArray[np.uint8], guess: NDArray[np.uint8], classes: NDArray[np.uint8]) -> float:
    """Mean over the classes that occur in either, in per cent; where ``truth`` is 255 nothing counts."""
    counted = truth != 255
    truth, guess = truth[counted], guess[counted]
    both = [
        ((truth == c) & (guess == c)).sum() / union for c in classes if (union := ((truth == c) | (guess == c)).sum())
    ]
    return float(100 * np.mean(both))


@dataclass(frozen=True)
class Match:
    """Points that are the same in two images.

    Attributes:
        source, target: (3, S, S) in [-1, 1].
        source_points, target_points: (K, 2) x and y in pixels.
        extent: In pixels; a point counts as found within a tenth of it.
    """

    source: Tensor
    target: Tensor
    source_points: NDArray[np.float32]
    target_points: NDArray[np.float32]
    extent: float


class _Pairs(Sequence[Tensor]):
    """(2, 3, S, S) each, put together when it is looked at: pairs share their images, and nothing is held twice."""

    def __init__(self, matches: Sequence[Match]):
        self.matches = matches

    def __len__(self) -> int:
        return len(self.matches)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody slices looks
        return torch.stack([self.matches[index].source, self.matches[index].target])


class Keypoints(Task):
    """Matched points: each goes to the most similar place of the other image, by cosine; nothing is trained.

    The score is PCK@0.1 in per cent. Of several activations the similarities are averaged, which is the cosine of their
    concatenation when each has unit length. A split leaves out a third of the pairs.

    Args:
        matches: At least three.
        seed: Of the splits.

    Raises:
        ValueError: Fewer than three pairs, images of other sizes, or a pair without points.
    """

    metric = "PCK@0.1"

    def __init__(self, matches: Sequence[Match], seed: int = 0):
        if len(matches) < SPLITS:
            raise ValueError(f"points are matched in at least {SPLITS} pairs of images, got {len(matches)}")
        for i, match in enumerate(matches):
            if len(match.source_points) == 0 or match.source_points.shape != match.target_points.shape:
                counts = f"{len(match.source_points)} source and {len(match.target_points)} target points"
                raise ValueError(f"pair {i} has {counts}; they must be equally many, 1 or more")
        self.matches = list(matches)
        self.looks = _Pairs(matches)
        self.points = max(len(match.source_points) for match in matches)
        self.side = min(FINEST, self.looks[0].shape[-1] // 4)
        order = np.random.default_rng(seed).permutation(len(matches))
        self.splits = [np.delete(order, np.s_[i::SPLITS]) for i in range(SPLITS)]

    def reduce(self, index: int, act: Tensor) -> NDArray[np.float16]:
        points, size = torch.from_numpy(self.matches[index].source_points).to(act), self.looks[index].shape[-1]
        source, target = F.interpolate(act.float(), (self.side, self.side), mode="bilinear")
        queries = F.grid_sample(
            source[None], (points / (size / 2) - 1)[None, None], align_corners=False, padding_mode="border"
        )[0, :, 0]
        similar = F.normalize(queries, dim=0).T @ F.normalize(target.flatten(1), dim=0)
        return F.pad(similar, (0, 0, 0, self.points - len(points))).cpu().numpy().astype(np.float16)

    def kept(self, channels: int) -> int:
        return 2 * len(self.looks) * self.points * self.side**2

    def score(self, members: Sequence[NDArray[np.float16]]) -> NDArray[np.float64]:
        best = sum(member.astype(np.float32) for member in members).argmax(-1)  # type: ignore[union-attr]
        step = self.looks[0].shape[-1] / self.side
        found = (np.stack([best % self.side, best // self.side], -1) + 0.5) * step
        hits = [
            np.linalg.norm(at[: len(match.target_points)] - match.target_points, axis=1) <= 0.1 * match.extent
            for at, match in zip(found, self.matches, strict=True)
        ]
        return np.array([100 * np.concatenate([hits[i] for i in split]).mean() for split in self.splits])


def warped(images: Sequence[Tensor], seed: int = 0, points: int = 12) -> list[Match]:
    """Each image and a rotated, scaled, shifted and recoloured copy of it, in which every place is known.

    For users who have neither masks nor keypoints. Such matches ask for places and not for meaning.

    Args:
        images: (3, S, S) each, in [-1, 1].
        seed: Of warps, colours and points.
        points: For each image.
    """
    rng, matches = np.random.default_rng(seed), []
    for image in images:
        size, angle, zoom = image.shape[-1], rng.uniform(-0.4, 0.4), rng.uniform(0.75, 1.25)
        turn = (
            np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom
        )  # from the copy to the image
        shift, gain = rng.uniform(-0.15, 0.15, 2), rng.uniform(0.7, 1.3, 3)
        theta = torch.tensor(np.c_[turn, shift], dtype=torch.float32)[None]
        copy = F.grid_sample(
            image[None],
            F.affine_grid(theta, [1, *image.shape], align_corners=False),
            align_corners=False,
            padding_mode="reflection",
        )[0]
        inside = rng.uniform(-0.9, 0.9, (50 * points, 2))
        source = inside @ turn.T + shift
        seen = np.abs(source).max(1) < 0.95
        source, target = ((at[seen][:points] + 1).astype(np.float32) * size / 2 for at in (source, inside))
        colours = torch.tensor(gain, dtype=torch.float32)[:, None, None]
        matches.append(Match(image, (copy * colours).clamp(-1, 1), source, target, extent=size / 2))
    return matches
