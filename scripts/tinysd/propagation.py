"""DAVIS: the mask of a sequence's first frame is carried through it by similarity alone, as DINO's evaluation does.

Every place takes the mean mask of its five most similar places (cosine; weights exp(similarity / 0.1)) in the first
and the last seven frames, at most 12 of 60 rows away. The mask is enlarged bilinearly; the object is what lies above
the middle of its range. J is the IoU, F the F-measure of outlines that agree within 0.008 of the diagonal, both as
DAVIS defines them: mean over all frames but the first and the last, then over sequences. The bootstrap draws sequences,
since the frames of one are alike.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021; Perazzi et al., A Benchmark Dataset and
Evaluation Methodology for Video Object Segmentation, 2016.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from intervals import Outcome
from photo_features import Features, load
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from tqdm import tqdm

TEMPERATURE, NEIGHBORS, LAST, REACH = 0.1, 5, 7, 12 / 60
BOUND = 0.008


def _around(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The places within reach of each, (places, reachable) as indices, and which of these are outside the map."""
    reach = round(REACH * height)
    steps = torch.arange(-reach, reach + 1)
    rows, columns = (torch.arange(n)[:, None] + steps for n in (height, width))
    outside = ((rows < 0) | (rows >= height))[:, None, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, None, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    return index.reshape(height * width, -1), outside.reshape(height * width, -1)


def propagate(maps: Iterable[Tensor], first: Tensor) -> Iterator[Tensor]:
    """Masks (h, w) in [0, 1] of every frame but the first.

    Args:
        maps: (C, h, w) of unit length, of each frame.
        first: (h, w) in [0, 1].
    """
    around, outside = _around(*first.shape)
    maps = iter(maps)
    start = (next(maps).flatten(1), first.flatten())
    recent: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=LAST)
    for frame in maps:
        known, here = [start, *recent], frame.flatten(1)
        similar = [(here.T @ f).gather(1, around).masked_fill_(outside, -torch.inf) for f, _ in known]
        best, which = torch.cat(similar, 1).topk(NEIGHBORS, 1)
        masks = torch.cat([mask[around] for _, mask in known], 1).gather(1, which)
        mask = ((best / TEMPERATURE).softmax(1) * masks).sum(1)
        recent.append((here, mask))
        yield mask.view_as(first)


def enlarged(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A mask in [0, 1] -> (H, W) booleans: what lies above the middle of its range; nothing, where it is flat."""
    large = F.interpolate(mask[None, None], size, mode="bilinear")[0, 0]
    return (large > (large.min() + large.max()) / 2).numpy()


def overlap(truth: np.ndarray, guess: np.ndarray) -> float:
    """J: intersection over union of two masks, 1 where both are empty."""
    union = (truth | guess).sum()
    return float((truth & guess).sum() / union) if union else 1.0


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or diagonally below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def outlines_agree(truth: np.ndarray, guess: np.ndarray) -> float:
    """F: the F-measure of two masks' outlines."""
    true, found = outline(truth), outline(guess)
    if not true.any() or not found.any():
        return float(true.any() == found.any())
    within = np.ceil(BOUND * np.hypot(*truth.shape))
    precision = (distance_transform_edt(~true)[found] <= within).mean()
    recall = (distance_transform_edt(~found)[true] <= within).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 127


@torch.no_grad()
def davis(data: Path, features: Features, most: int | None = None) -> dict[str, Outcome]:
    """J, F and their mean."""
    root = data / "davis16"
    sequences = sorted(path for path in root.glob("JPEGImages/*/*") if path.is_dir())
    if not sequences:
        raise SystemExit(f"{root} holds no JPEGImages/RESOLUTION/SEQUENCE, expected DAVIS 2016.")
    scores = []
    for sequence in sequences[:most]:
        frames = sorted(sequence.glob("*.jpg"))
        labels = root / "Annotations" / sequence.parent.name / sequence.name
        truth = [_mask(labels / f"{frame.stem}.png") for frame in frames]
        shown = tqdm(frames, desc=f"DAVIS, {sequence.name}", leave=False, mininterval=10)
        maps = (features.matching(load(frame)[0])[0] for frame in shown)
        grid = tuple(n // 4 for n in load(frames[0])[0].shape[-2:])
        first = np.asarray(Image.fromarray(truth[0]).resize(grid[::-1], Image.Resampling.NEAREST), np.float32)
        found = [enlarged(mask, truth[0].shape) for mask in propagate(maps, torch.tensor(first))]
        inner = list(zip(truth[1:-1], found[:-1], strict=True))
        scores.append([np.mean([measure(t, f) for t, f in inner]) for measure in (overlap, outlines_agree)])
    units = 100 * np.array(scores)
    parts = {"J&F": units.mean(1), "J": units[:, 0], "F": units[:, 1]}
    return {f"DAVIS {name}": Outcome(part, lambda chosen: float(chosen.mean())) for name, part in parts.items()}
