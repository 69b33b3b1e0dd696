"""The tasks that activations are compared on: a label-scarce segmentation probe, and matched points.

A task reads every activation of an image (or of a pair) once and caches the little that its score needs: features at a
few hundred places, or the similarities of a few points. From that it scores any set of activations: single ones when
they are compared, and combinations when a recipe is chosen. The network does not run again.
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

from diffusion_backbones.evaluation.labels import IGNORED, points
from diffusion_backbones.evaluation.metrics import correct_keypoints, mean_iou, pck

POINTS = 400
"""Number of places in an image at which a segmentation probe reads features."""
FINEST = 64
"""Most places along a side of the grid on which points are matched."""
SPLITS = 3
"""Number of scores, each on another split of the same data."""


class Task(ABC):
    """Data, and a score for a set of activations.

    Attributes:
        metric: Name of the score; higher is better.
        views: (B, 3, S, S) each, in [-1, 1]: the images that the network must see together.
    """

    metric: str
    views: Sequence[Tensor]

    @abstractmethod
    def reduce(self, index: int, act: Tensor) -> NDArray[np.float32]:
        """The part of an activation that the score needs, for one view; the same shape for all views.

        Args:
            index: Position of the view.
            act: (B, C, h, w), one row for each image of the view.
        """

    @abstractmethod
    def cached_bytes(self, channels: int) -> int:
        """Bytes that :meth:`reduce` returns for an activation with this number of channels, over all views."""

    @abstractmethod
    def score(self, features: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """(SPLITS,) scores of several activations together.

        Args:
            features: (views, ...) for each activation: what :meth:`reduce` returned, stacked.
        """


class Segmentation(Task):
    """A linear probe on few labelled images: ridge regression of the classes on standardised features, with all
    activations concatenated.

    Each split trains on another half of the images and is scored on the rest.

    Args:
        images: (3, S, S) each, in [-1, 1].
        masks: (S, S) each, integers from 0; 255 is ignored.
        seed: Seed of places and splits.

    Raises:
        ValueError: There are fewer than four images or two classes, or an image lacks a mask of its size, or one that
            holds classes.
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
                    f"mask {i} is {mask.shape} and its image {tuple(image.shape[1:])}; they must have the same size"
                )
            if mask.dtype.kind not in "iu":
                raise ValueError(f"mask {i} holds {mask.dtype}, and classes are integers from 0")
        self.views, rng = [image[None] for image in images], np.random.default_rng(seed)
        size = images[0].shape[-1]
        self.places = rng.integers(0, size, (len(images), POINTS, 2))  # row, column
        labels = np.stack([mask[at[:, 0], at[:, 1]] for mask, at in zip(masks, self.places, strict=True)])
        self.classes = np.unique(labels[labels != IGNORED])
        if len(self.classes) < 2:
            raise ValueError(
                f"a probe needs at least two classes, and the masks hold {len(self.classes)}: {self.classes.tolist()}"
            )
        self.labels = labels
        self.splits = [rng.permutation(len(images)) < len(images) // 2 for _ in range(SPLITS)]

    def reduce(self, index: int, act: Tensor) -> NDArray[np.float32]:
        """(POINTS, C): the features at the places of an image."""
        at = torch.from_numpy(self.places[index]).to(act.device).flip(1)
        grid = (at.float() + 0.5) / (self.views[index].shape[-1] / 2) - 1
        read = F.grid_sample(act.float(), grid[None, None], align_corners=False, padding_mode="border")[0, :, 0]
        return read.T.cpu().numpy()

    def cached_bytes(self, channels: int) -> int:
        """Bytes of float16 features at all places."""
        return 2 * len(self.views) * POINTS * channels

    def score(self, features: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """mIoU of the probe for each split, from 0 to 100."""
        joint = np.concatenate(features, 2, dtype=np.float32)
        return np.array([self._probe(joint, train) for train in self.splits])

    def _probe(self, features: NDArray[np.float32], train: NDArray[np.bool_]) -> float:
        from sklearn.linear_model import RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known, asked = (features[rows].reshape(-1, features.shape[-1]) for rows in (train, ~train))
        truth, expected = self.labels[train].ravel(), self.labels[~train].ravel()
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100.0))
        probe.fit(known[truth != IGNORED], truth[truth != IGNORED])
        return mean_iou(expected, probe.predict(asked), self.classes)


@dataclass(frozen=True)
class Match:
    """Matched points in two images.

    Attributes:
        source, target: (3, S, S) in [-1, 1].
        source_points, target_points: (K, 2) x and y in pixels; row k is the same point in both.
        extent: Longer side of the object in pixels; a point is found within a tenth of it.
    """

    source: Tensor
    target: Tensor
    source_points: NDArray[np.float32]
    target_points: NDArray[np.float32]
    extent: float


class _Pairs(Sequence[Tensor]):
    """(2, 3, S, S) each, stacked when it is read: pairs share images, and none is held twice."""

    def __init__(self, matches: Sequence[Match]):
        self.matches = matches

    def __len__(self) -> int:
        return len(self.matches)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # views are never sliced
        return torch.stack([self.matches[index].source, self.matches[index].target])


class Keypoints(Task):
    """Matched points: each is matched to the most similar place of the other image, by cosine; nothing is trained.

    The score is PCK@0.1 in per cent. The similarities of several activations are averaged, which equals the cosine of
    their concatenation when each has unit length. A split leaves out a third of the pairs.

    Args:
        matches: At least three.
        seed: Seed of the splits.

    Raises:
        ValueError: There are fewer than three pairs, or a pair has no points, not equally many in both images, or
            others than finite x and y, or no extent.
    """

    metric = "PCK@0.1"

    def __init__(self, matches: Sequence[Match], seed: int = 0):
        if len(matches) < SPLITS:
            raise ValueError(f"points are matched in at least {SPLITS} pairs of images, got {len(matches)}")
        for i, match in enumerate(matches):
            if len(match.source_points) == 0 or match.source_points.shape != match.target_points.shape:
                counts = f"{len(match.source_points)} source and {len(match.target_points)} target points"
                raise ValueError(f"pair {i} has {counts}; they must be equally many, 1 or more")
            points(match.source_points, f"pair {i}: source_points")
            points(match.target_points, f"pair {i}: target_points")
            if not 0 < match.extent < np.inf:
                raise ValueError(f"pair {i}: extent must be a length in pixels above 0, got {match.extent}")
        self.matches = list(matches)
        self.views = _Pairs(matches)
        self.points = max(len(match.source_points) for match in matches)
        self.side = min(FINEST, self.views[0].shape[-1] // 4)
        order = np.random.default_rng(seed).permutation(len(matches))
        self.splits = [np.delete(order, np.s_[i::SPLITS]) for i in range(SPLITS)]

    def reduce(self, index: int, act: Tensor) -> NDArray[np.float32]:
        """(points, side²): the similarities of the source points to all places of the target."""
        points, size = torch.from_numpy(self.matches[index].source_points).to(act), self.views[index].shape[-1]
        source, target = F.interpolate(act.float(), (self.side, self.side), mode="bilinear")
        queries = F.grid_sample(
            source[None], (points / (size / 2) - 1)[None, None], align_corners=False, padding_mode="border"
        )[0, :, 0]
        similar = F.normalize(queries, dim=0).T @ F.normalize(target.flatten(1), dim=0)
        return F.pad(similar, (0, 0, 0, self.points - len(points))).cpu().numpy()

    def cached_bytes(self, channels: int) -> int:  # noqa: ARG002  # similarities have no channels
        """Bytes of float16 similarities of all points."""
        return 2 * len(self.views) * self.points * self.side**2

    def score(self, features: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """PCK@0.1 for each split, from 0 to 100."""
        best = sum(similar.astype(np.float32) for similar in features).argmax(-1)  # type: ignore[union-attr]
        step = self.views[0].shape[-1] / self.side
        found = (np.stack([best % self.side, best // self.side], -1) + 0.5) * step
        correct = [
            correct_keypoints(at[: len(match.target_points)], match.target_points, match.extent)
            for at, match in zip(found, self.matches, strict=True)
        ]
        return np.array([pck([correct[i] for i in split]) for split in self.splits])


def warped(images: Sequence[Tensor], seed: int = 0, points: int = 12) -> list[Match]:
    """Each image and a rotated, scaled, shifted and recoloured copy of it, with known matches.

    For users who have neither masks nor keypoints. Such matches test places, not meaning.

    Args:
        images: (3, S, S) each, in [-1, 1].
        seed: Seed of warps, colours and points.
        points: Number of points in each image.
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
