"""The yardstick on photographs. DATA holds folders in their original layouts: ``camvid``, ``pf-willow``, ``photos192``.

*CamVid*: a linear probe (ridge regression on one-hot classes, features standardised, its weight chosen on ``val``) on
300 places of each training photograph; mIoU of 11 classes on the test photographs; the bootstrap draws photographs.

*PF-WILLOW*: every keypoint goes to the most similar place (cosine, levels of unit length) of the other image; PCK at
0.05, 0.1 and 0.15 of the longer side of the keypoints' extent in the target; the bootstrap draws pairs. ``position``
takes the same relative place; ``colour`` compares patches of 17 x 17 pixels less their mean.

*Classes*: the same linear probe on features averaged over the image, 20 training photographs of every class; accuracy
on the held-out ones; the bootstrap draws photographs.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from photo_features import Extract, at_quarter, load, pooled
from PIL import Image
from scipy.io import loadmat
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

PLACES, CLASS_TRAIN = 300, 20
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Times the number of rows."""
DRAWS = 1000
IGNORED = 11
Figure = tuple[float, float, float]
"""Value and the ends of its 95 % interval, in per cent."""


def bootstrap(value: Callable[[np.ndarray], float], number: int) -> Figure:
    """``value`` of the indices of all, and its percentiles over draws with replacement."""
    rng = np.random.default_rng(0)
    drawn = [value(rng.integers(0, number, number)) for _ in range(DRAWS)]
    return value(np.arange(number)), float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))


class Probe:
    """Ridge regression on one-hot classes, of standardised features."""

    def __init__(self, x: Tensor, y: np.ndarray, classes: int):
        self.mean, self.std = x.mean(0), x.std(0).clamp(min=1e-6)
        x = self._standard(x)
        target = F.one_hot(torch.from_numpy(y).long(), classes).float()
        self.bias = target.mean(0)
        self.gram, self.cross, self.rows = x.T @ x, x.T @ (target - self.bias), len(x)

    def _standard(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def fit(self, ridge: float) -> None:
        penalty = ridge * self.rows * torch.eye(len(self.gram))
        self.weights = torch.linalg.solve(self.gram + penalty, self.cross)

    def choose(self, score: Callable[[], float]) -> None:
        """Take the ridge with the best score."""
        found = {}
        for ridge in RIDGES:
            self.fit(ridge)
            found[ridge] = score()
        self.fit(max(found, key=lambda ridge: found[ridge]))

    def __call__(self, x: Tensor) -> np.ndarray:
        return (self._standard(x) @ self.weights + self.bias).argmax(1).numpy()


def _camvid(folder: Path, split: str, extract: Extract, most: int | None) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Features (places, C) and classes of every photograph."""
    paths = sorted((folder / split).glob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder / split} holds no photographs (*.jpg), expected those of CamVid.")
    for path in tqdm(paths[:most], desc=f"CamVid, {split}", leave=False, mininterval=10):
        x, _ = load(path)
        f = at_quarter(extract(x), x.shape[-2:], unit=False)
        with Image.open(folder / f"{split}annot" / f"{path.stem}.png") as image:
            labels = np.asarray(image.resize((f.shape[2], f.shape[1]), Image.Resampling.NEAREST))
        yield f.flatten(1).T, labels.ravel()


def mean_iou(tables: np.ndarray) -> float:
    """Of confusion tables (images, classes, classes), over the classes that occur."""
    table = tables.sum(0)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float(100 * (table.diagonal()[union > 0] / union[union > 0]).mean())


@torch.no_grad()
def camvid(data: Path, _: str, extract: Extract, most: int | None = None) -> dict[str, Figure]:
    """mIoU of the linear probe."""
    rng, features, labels = np.random.default_rng(0), [], []
    for f, y in _camvid(data / "camvid", "train", extract, most):
        known = np.flatnonzero(y < IGNORED)
        drawn = rng.choice(known, min(PLACES, len(known)), replace=False)
        features.append(f[torch.from_numpy(drawn)])
        labels.append(y[drawn])
    probe = Probe(torch.cat(features), np.concatenate(labels), IGNORED)

    def tables(photographs: list[tuple[Tensor, np.ndarray]]) -> np.ndarray:
        found = []
        for f, y in photographs:
            known = y < IGNORED
            pairs = y[known].astype(int) * IGNORED + probe(f.float())[known]
            found.append(np.bincount(pairs, minlength=IGNORED**2).reshape(IGNORED, IGNORED))
        return np.stack(found)

    some = [(f[::8].half(), y[::8]) for f, y in _camvid(data / "camvid", "val", extract, most)]
    probe.choose(lambda: mean_iou(tables(some)))
    counted = np.concatenate([tables([one]) for one in _camvid(data / "camvid", "test", extract, most)])
    return {"CamVid mIoU": bootstrap(lambda which: mean_iou(counted[which]), len(counted))}


def _patches(x: Tensor) -> Tensor:
    """(C, H / 4, W / 4): patches of 17 x 17 pixels less their mean."""
    padded = F.unfold(F.pad(x, (8,) * 4, mode="reflect"), 17, stride=1).unflatten(2, x.shape[-2:])
    patches = padded[0, :, 2::4, 2::4]
    return patches - patches.mean(0)


@torch.no_grad()
def willow(data: Path, name: str, extract: Extract, most: int | None = None) -> dict[str, Figure]:
    """PCK of matched keypoints."""
    root = data / "pf-willow" / "PF-dataset-WILLOW"
    groups = [sorted(folder.glob("*.png")) for folder in sorted(root.iterdir())] if root.is_dir() else []
    if not any(groups):
        raise SystemExit(f"{root} holds no CLASS/NAME.png, expected PF-WILLOW in its original layout.")
    hits: list[np.ndarray] = []
    for group in tqdm(groups[:most], desc="PF-WILLOW", leave=False, mininterval=10):
        known = []
        for path in group:
            x, scale = load(path)
            points = (loadmat(path.with_suffix(".mat"))["pts_coord"].T - 0.5) * scale  # MATLAB counts from 1
            f = _patches(x) if name == "colour" else at_quarter(extract(x), x.shape[-2:], unit=True)
            known.append((F.normalize(f, dim=0), torch.from_numpy(points).float(), torch.tensor(x.shape[:-3:-1])))
        for a, here, size_a in known:
            places = (here / size_a * 2 - 1)[None, None]
            queries = F.normalize(F.grid_sample(a[None], places, align_corners=False)[0, :, 0], dim=0)
            for b, there, size_b in known:
                if a is b:
                    continue
                best = (queries.T @ b.flatten(1)).argmax(1)
                found = (torch.stack([best % b.shape[2], best // b.shape[2]], 1) + 0.5) * 4
                if name == "position":
                    found = here / size_a * size_b
                extent = (there.amax(0) - there.amin(0)).max()
                error = (found - there).norm(dim=1) / extent
                hits.append(np.stack([(error <= alpha).numpy() for alpha in (0.05, 0.1, 0.15)]))
    found = np.stack(hits)  # pairs, thresholds, points
    named = zip((0.05, 0.1, 0.15), range(3), strict=True)
    return {
        f"PF-WILLOW PCK@{alpha}": bootstrap(lambda which, i=i: 100 * float(found[which, i].mean()), len(found))
        for alpha, i in named
    }


def _photographs(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on, some of every class, and held-out ones."""
    train: dict[str, list[dict[str, str]]] = {}
    test = []
    for row in csv.DictReader((folder / "index.csv").open(newline="")):
        if hashlib.sha256(row["file"].encode()).digest()[0] % 20 == 0:  # as photographs.py holds out
            test.append(row)
        elif len(train.setdefault(row["class"], [])) < CLASS_TRAIN:
            train[row["class"]].append(row)
    return [row for rows in train.values() for row in rows], test


@torch.no_grad()
def classes(data: Path, name: str, extract: Extract, most: int | None = None) -> dict[str, Figure]:
    """Accuracy of the linear probe on pooled features."""
    folder = data / "photos192"
    if not (folder / "index.csv").is_file():
        raise SystemExit(f"{folder} holds no index.csv, expected captioned photographs.")
    train, test = _photographs(folder)
    names = sorted({row["class"] for row in train} & {row["class"] for row in test})[: 5 * most if most else None]
    train = [row for row in train if row["class"] in names]

    def described(rows: list[dict[str, str]]) -> tuple[Tensor, np.ndarray]:
        found = []
        with contextlib.ExitStack() as stack:
            shards = {row["shard"] for row in rows}
            archives = {shard: stack.enter_context(tarfile.open(folder / shard)) for shard in shards}
            for row in tqdm(rows, desc="classes", leave=False, mininterval=10):
                file = archives[row["shard"]].extractfile(row["file"])
                x = to_tensor(Image.open(io.BytesIO(file.read())).convert("RGB"))[None] * 2 - 1  # type: ignore[union-attr]
                # Colour keeps its layout, in 8 x 8 places: it is position too.
                found.append(F.adaptive_avg_pool2d(x, 8).flatten() if name == "colour" else pooled(extract(x)))
        return torch.stack(found), np.array([names.index(row["class"]) for row in rows])

    test = [row for row in test if row["class"] in names]
    x, y = described(train)
    fitted = np.random.default_rng(0).random(len(x)) < 0.8
    inner = Probe(x[torch.from_numpy(fitted)], y[fitted], len(names))
    scores = {}
    for ridge in RIDGES:
        inner.fit(ridge)
        scores[ridge] = float((inner(x[torch.from_numpy(~fitted)]) == y[~fitted]).mean())
    probe = Probe(x, y, len(names))
    probe.fit(max(scores, key=lambda ridge: scores[ridge]))
    tested, truth = described(test)
    right = probe(tested) == truth
    return {"class accuracy": bootstrap(lambda which: 100 * float(right[which].mean()), len(right))}


TASKS = {"camvid": camvid, "willow": willow, "classes": classes}
