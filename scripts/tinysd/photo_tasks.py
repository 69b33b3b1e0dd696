"""The tasks on photographs. DATA holds folders in their original layouts: ``camvid``, ``pf-willow``, ``photos192``.

*CamVid*: a linear probe (ridge regression on one-hot classes, features standardized, its weight chosen on ``val``) on
300 places of each training photograph; mIoU of 11 classes on the test photographs; the bootstrap draws photographs.

*PF-WILLOW*: every keypoint goes to the most similar place (cosine, levels of unit length) of the other image; PCK at
0.05, 0.1 and 0.15 of the longer side of the keypoints' extent in the target; the bootstrap draws pairs.

*Classes*: the same linear probe on features averaged over the image, 20 training photographs of every class (a fifth of
them choose its weight); accuracy on the held-out ones; the bootstrap draws photographs.

*DAVIS*: ``propagation.py``.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from intervals import Outcome, mean_iou, share
from linear_probe import RIDGES, Probe
from photo_features import Features, load, nearest
from PIL import Image
from scipy.io import loadmat
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

PLACES, CLASS_TRAIN, BATCH = 300, 20, 16
IGNORED = 11
ALPHAS = (0.05, 0.1, 0.15)


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) is taken for each (column)."""
    counts = np.bincount(truth.astype(int) * classes + guess, minlength=classes**2)
    return counts.reshape(classes, classes)


def _camvid(folder: Path, split: str, features: Features, most: int | None) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Features (places, C) and classes of every photograph."""
    paths = sorted((folder / split).glob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder / split} holds no photographs (*.jpg), expected those of CamVid.")
    for path in tqdm(paths[:most], desc=f"CamVid, {split}", leave=False, mininterval=10):
        f = features.dense(load(path)[0])[0]
        with Image.open(folder / f"{split}annot" / f"{path.stem}.png") as image:
            labels = np.asarray(image.resize((f.shape[2], f.shape[1]), Image.Resampling.NEAREST))
        yield f.flatten(1).T, labels.ravel()


@torch.no_grad()
def camvid(data: Path, features: Features, most: int | None = None) -> dict[str, Outcome]:
    """mIoU of the linear probe."""
    rng, found, labels = np.random.default_rng(0), [], []
    for f, y in _camvid(data / "camvid", "train", features, most):
        known = np.flatnonzero(y < IGNORED)
        drawn = rng.choice(known, min(PLACES, len(known)), replace=False)
        found.append(f[torch.from_numpy(drawn)])
        labels.append(y[drawn])
    probe = Probe(torch.cat(found), np.concatenate(labels), IGNORED)

    def tables(photographs: Iterable[tuple[Tensor, np.ndarray]]) -> np.ndarray:
        return np.stack([confusion(y[y < IGNORED], probe(f)[y < IGNORED], IGNORED)[None] for f, y in photographs])

    val = [(f.half(), y) for f, y in _camvid(data / "camvid", "val", features, most)]
    probe.choose(lambda: mean_iou(tables(val)))
    return {"CamVid mIoU": Outcome(tables(_camvid(data / "camvid", "test", features, most)), mean_iou)}


@torch.no_grad()
def willow(data: Path, features: Features, most: int | None = None) -> dict[str, Outcome]:
    """PCK of matched keypoints."""
    root = data / "pf-willow" / "PF-dataset-WILLOW"
    groups = [sorted(folder.glob("*.png")) for folder in sorted(root.iterdir())] if root.is_dir() else []
    if not any(groups):
        raise SystemExit(f"{root} holds no CLASS/NAME.png, expected PF-WILLOW in its original layout.")
    hits: list[list[list[int]]] = []
    for group in tqdm(groups[:most], desc="PF-WILLOW", leave=False, mininterval=10):
        known = []
        for path in group:
            x, scale = load(path)
            points = torch.from_numpy(loadmat(path.with_suffix(".mat"))["pts_coord"].T - 0.5)  # MATLAB counts from 1
            known.append(
                (features.matching(x)[0], points * scale / torch.tensor(x.shape[:-3:-1]) * 2 - 1, points, scale)
            )
        for a, places, _, _ in known:
            for b, _, there, scale in known:
                if a is not b:
                    error = (nearest(a, b, places) / scale - there).norm(dim=1)
                    limits = torch.tensor(ALPHAS) * (there.amax(0) - there.amin(0)).max()
                    hits.append([[int((error <= limit).sum()), len(error)] for limit in limits])
    pairs = np.array(hits)
    return {f"PF-WILLOW PCK@{alpha}": Outcome(pairs[:, i], share) for i, alpha in enumerate(ALPHAS)}


Row = dict[str, str]


def rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """Captioned photographs of a class: those to train on, and the held-out twentieth, as ``photographs.py`` holds out.

    Raises:
        SystemExit: There is no index.
    """
    if not (folder / "index.csv").is_file():
        raise SystemExit(f"{folder} holds no index.csv, expected captioned photographs.")
    known = [row for row in csv.DictReader((folder / "index.csv").open(newline="")) if row["class"]]
    held_out = [hashlib.sha256(row["file"].encode()).digest()[0] % 20 == 0 for row in known]
    return tuple([row for row, out in zip(known, held_out, strict=True) if out == side] for side in (False, True))


def common(some: Sequence[Row], number: int) -> list[str]:
    """The classes with most photographs, most first; by name where they have as many."""
    counts = collections.Counter(row["class"] for row in some)
    return sorted(counts, key=lambda name: (-counts[name], name))[:number]


def caption(some: Sequence[Row], name: str) -> str:
    """The caption of a class."""
    return next(row["caption"] for row in some if row["class"] == name)


def pictures(folder: Path, wanted: Sequence[Row]) -> Iterator[Image.Image]:
    """The photographs of these rows."""
    with contextlib.ExitStack() as stack:
        shards = {row["shard"] for row in wanted}
        archives = {shard: stack.enter_context(tarfile.open(folder / shard)) for shard in shards}
        for row in tqdm(wanted, desc="photographs", leave=False, mininterval=10):
            file = archives[row["shard"]].extractfile(row["file"])
            yield Image.open(io.BytesIO(file.read())).convert("RGB")  # type: ignore[union-attr]


@torch.no_grad()
def pooled(features: Features, images: Iterable[Image.Image]) -> Tensor:
    """(N, C) of images of one size."""
    x = torch.stack([(to_tensor(image) * 255).round().byte() for image in images])
    batches = tqdm(x.split(BATCH), desc="pooled", leave=False, mininterval=10)
    return torch.cat([features.pooled(batch.float() / 127.5 - 1) for batch in batches])


def classes(data: Path, features: Features, most: int | None = None) -> dict[str, Outcome]:
    """Accuracy of the linear probe on pooled features."""
    folder = data / "photos192"
    train, test = rows(folder)
    names = sorted({row["class"] for row in train} & {row["class"] for row in test})[: 5 * most if most else None]
    by_class = {name: [row for row in train if row["class"] == name][:CLASS_TRAIN] for name in names}
    train = [row for some in by_class.values() for row in some]
    test = [row for row in test if row["class"] in by_class]
    x, tested = (pooled(features, pictures(folder, some)) for some in (train, test))
    y, truth = (np.array([names.index(row["class"]) for row in some]) for some in (train, test))
    fitted = np.random.default_rng(0).random(len(x)) < 0.8
    inner = Probe(x[torch.from_numpy(fitted)], y[fitted], len(names))
    scores = {}
    for ridge in RIDGES:
        inner.fit(ridge)
        scores[ridge] = float((inner(x[torch.from_numpy(~fitted)]) == y[~fitted]).mean())
    probe = Probe(x, y, len(names))
    probe.fit(max(scores, key=lambda ridge: scores[ridge]))
    right = probe(tested) == truth
    return {f"accuracy of {len(names)} classes": Outcome(np.stack([right, np.ones_like(right)], 1).astype(int), share)}
