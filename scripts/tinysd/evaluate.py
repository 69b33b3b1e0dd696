"""What the features of tinysd are worth: a linear probe and matched keypoints on the evaluation set in the package.

    python scripts/tinysd/evaluate.py [--csv docs/tinysd.csv] [--only probe|keypoints] [BACKBONE ...]
    python scripts/tinysd/evaluate.py --photographs DATA [--weights FOLDER] [--resnet open-nsfw.onnx] [FEATURES ...]

*Probe*: multinomial logistic regression on standardised features, all levels resized bilinearly to a quarter of the
input and concatenated, from 20000 pixels of 50 of the 80 probe scenes; a seed draws both. Reported is the mIoU over all
classes, background included, on new scenes, on held-out identities and on a held-out style.

*Keypoints*: every source point goes to the most similar place (cosine, all levels at a quarter of the input, each level
brought to unit length first, so that a wide level does not outvote a narrow one) anywhere in the target; PCK@0.1 is the
share that lands within 0.1 of the longer side of the object's box. Nothing is trained.

With ``--photographs`` the tasks are those of ``photo_tasks.py``, on data that is no part of this repository, and the
baselines those of ``photo_features.py``.

Baselines: ``untrained``, the same network as ``tinysd_gdf`` with random weights, of which a seed draws another;
``rgb``, colour and position for the probe, patches of 17 x 17 pixels less their mean for keypoints. Seeds are 0, 1 and
2.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import photo_features
import photo_tasks
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import diffusion_backbones as db
from diffusion_backbones.evaluation.scenes import Scene, SceneSet, load_scenes

SEEDS = (0, 1, 2)
PIXELS, SCENES = 20000, 50
SINGLE = (
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level1-repeat2-res-out",
    "up-level2-repeat1-vit-block0-cross-q",
    "up-level3-repeat0-vit-block0-self-k",
    "mid-vit-block0-self-k",
)
Extract = Callable[[Tensor], list[Tensor]]
"""(1, 3, S, S) in [-1, 1] -> maps (1, C, h, w)."""


def method(name: str, seed: int) -> Extract:
    """What turns an image into maps: a backbone's name, an activation's id or a recipe's file on ``tinysd``,
    ``untrained`` or ``rgb``.
    """
    if name == "rgb":
        return lambda x: [x]
    if name == "untrained":
        torch.manual_seed(seed)
        return db.create_model("tinysd_gdf")
    if name in SINGLE:
        return db.create_model("tinysd", pretrained=True, recipe=[name], timestep=51)
    if name.endswith(".yaml"):
        return db.create_model("tinysd", pretrained=True, recipe=name)
    return db.create_model(name, pretrained=True)


def at_quarter(maps: Sequence[Tensor], size: tuple[int, int], unit: bool) -> Tensor:
    """Maps of one image -> (C, S / 4, S / 4), each level resized bilinearly, of unit length if ``unit``."""
    grid = (size[0] // 4, size[1] // 4)
    resized = [F.interpolate(m, grid, mode="area" if m.shape[-1] > grid[1] else "bilinear") for m in maps]
    return torch.cat([F.normalize(m, dim=1) if unit else m for m in resized], 1)[0]


@torch.no_grad()
def pixels(extract: Extract, scenes: Sequence[Scene], name: str, step: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, S / 4 * S / 4, C) float16 and classes (N, S / 4 * S / 4) of scenes."""
    features, labels = [], []
    for scene in tqdm(scenes, desc=f"{name}: {step}", leave=False, mininterval=5):
        x = to_tensor(scene.image)[None] * 2 - 1
        f = at_quarter(extract(x), x.shape[-2:], unit=False)
        if name == "rgb":
            places = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in f.shape[1:]), indexing="ij")
            f = torch.cat([f, torch.stack(places)])
        features.append(f.flatten(1).T.half().numpy())
        labels.append(scene.classes[2::4, 2::4].ravel())
    return np.stack(features), np.stack(labels)


def mean_iou(truth: np.ndarray, guess: np.ndarray, classes: int) -> float:
    """Mean over the classes that occur in ``truth`` or ``guess``, in per cent."""
    table = np.bincount(truth.ravel().astype(int) * classes + guess.ravel(), minlength=classes**2).reshape(
        classes, classes
    )
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float(100 * (table.diagonal()[union > 0] / union[union > 0]).mean())


def probe(name: str, data: SceneSet, seeds: Sequence[int] = SEEDS) -> dict[str, list[float]]:
    """mIoU by split, one value a seed."""
    results: dict[str, list[float]] = {"scenes": [], "identities": [], "style": []}
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for seed in seeds:
        if name == "untrained" or not known:
            extract = method(name, seed)
            known = {split: pixels(extract, getattr(data, split), name, split) for split in ("probe", *results)}
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(data.probe), SCENES, replace=False)
        x, y = (part[chosen].reshape(-1, *part.shape[2:]) for part in known["probe"])
        some = rng.choice(len(x), PIXELS, replace=False)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
        classifier.fit(x[some].astype(np.float32), y[some])
        for split, values in results.items():
            features, truth = known[split]
            guess = classifier.predict(features.reshape(-1, features.shape[-1]).astype(np.float32))
            values.append(mean_iou(truth, guess, len(data.classes)))
    return results


@torch.no_grad()
def keypoints(name: str, data: SceneSet) -> dict[str, list[float]]:
    """PCK@0.1 by split in per cent; one value a seed for ``untrained``, otherwise one."""
    results: dict[str, list[float]] = {"pairs, identities": [], "pairs, style": []}
    for seed in SEEDS if name == "untrained" else SEEDS[:1]:
        extract = method(name, seed)
        hits: dict[str, list[bool]] = {split: [] for split in results}
        for pair in tqdm(data.pairs, desc=f"{name}: pairs", leave=False, mininterval=5):
            a, b = (_describe(extract, name, to_tensor(image)[None] * 2 - 1) for image in (pair.source, pair.target))
            width = b.shape[-1]
            step = pair.target.width / width
            places = torch.from_numpy(pair.source_points)[None, None] / (pair.source.width / 2) - 1
            queries = F.normalize(F.grid_sample(a[None], places, mode="bilinear", align_corners=False)[0, :, 0], dim=0)
            best = (queries.T @ F.normalize(b.flatten(1), dim=0)).argmax(1)
            found = (torch.stack([best % width, best // width], 1) + 0.5) * step
            x0, y0, x1, y1 = pair.target_box
            error = (found - torch.from_numpy(pair.target_points)).norm(dim=1)
            hits[f"pairs, {pair.split}"] += (error <= 0.1 * max(x1 - x0, y1 - y0)).tolist()
        for split, values in results.items():
            values.append(100 * statistics.fmean(hits[split]))
    return results


def _describe(extract: Extract, name: str, x: Tensor) -> Tensor:
    if name != "rgb":
        return at_quarter(extract(x), x.shape[-2:], unit=True)
    patches = F.unfold(F.pad(x, (8,) * 4, mode="reflect"), 17, stride=1).unflatten(2, x.shape[-2:])[0, :, 2::4, 2::4]
    return patches - patches.mean(0)


def photographs(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Measure on photographs; ``untrained`` once for every seed."""
    rows = []
    for name in names:
        for seed in SEEDS if name == "untrained" else SEEDS[:1]:
            extract = photo_features.method(name, seed, args.weights, args.resnet)
            measured: dict[str, photo_tasks.Figure] = {}
            for task, measure in photo_tasks.TASKS.items():
                if args.only in (None, task):
                    measured |= measure(args.photographs, name, extract, args.most)
            for metric, (value, low, high) in measured.items():
                figures = {"value": f"{value:.2f}", "low": f"{low:.2f}", "high": f"{high:.2f}"}
                rows.append({"features": name, "seed": seed, "metric": metric, **figures})
            told = "  ".join(f"{m} {v:.1f} [{low:.1f}, {high:.1f}]" for m, (v, low, high) in measured.items())
            print(f"{name:20} seed {seed}  {told}", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tinysd = db.list_models("tinysd_*")
    default = ["rgb", "untrained", *tinysd, *SINGLE]
    parser.add_argument(
        "backbones",
        nargs="*",
        default=default,
        metavar="BACKBONE",
        help="default: all that are named above",
    )
    parser.add_argument("--only", choices=("probe", "keypoints", *photo_tasks.TASKS))
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--photographs", type=Path, metavar="DATA", help="measure on photographs instead")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of tinysd (default those in the package)")
    parser.add_argument("--resnet", type=Path, metavar="ONNX", help="open-nsfw.onnx, for the features resnet")
    parser.add_argument("--most", type=int, metavar="N", help="try it on N photographs of a split, or groups")
    args = parser.parse_args()
    if args.photographs:
        photographs(args, args.backbones if args.backbones != default else [*photo_features.BASELINES, *tinysd])
        return
    data, rows = load_scenes(), []
    for name in args.backbones:
        measured = {} if args.only == "keypoints" else probe(name, data)
        measured |= {} if args.only == "probe" else keypoints(name, data)
        for split, values in measured.items():
            metric = "PCK@0.1" if split.startswith("pairs") else "mIoU"
            mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            rows.append(
                {
                    "features": name,
                    "split": split,
                    "metric": metric,
                    "mean": f"{mean:.2f}",
                    "std": f"{spread:.2f}",
                    "seeds": len(values),
                }
            )
        print(
            f"{name:40}",
            "  ".join(f"{r['split']} {r['mean']} ± {r['std']}" for r in rows if r["features"] == name),
            flush=True,
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
