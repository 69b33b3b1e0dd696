"""The tasks on drawn scenes: a linear probe and matched keypoints, on the evaluation set in the package.

*Probe*: multinomial logistic regression on standardized features from 50 places of each of 400 scenes, which are drawn
on the fly with seeds that neither training nor the evaluation set has; three probes draw three times the places. mIoU
over all classes, background included, on new scenes, held-out identities and a held-out style; the mean of the three
probes; the bootstrap draws scenes.

*Keypoints*: every source point goes to the most similar place anywhere in the target; PCK@0.1 is the share that lands
within 0.1 of the longer side of the object's box. Nothing is trained; the bootstrap draws pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import evaluation_set
import numpy as np
import scenes
import sprites
import torch
from intervals import Outcome, mean_iou, share
from photo_features import STEP, Features, nearest
from photo_tasks import confusion
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from diffusion_backbones.evaluation.metrics import correct_keypoints
from diffusion_backbones.evaluation.scenes import Scene, SceneSet

SCENES, PLACES, PROBES = 400, 50, 3
STREAM = 200
"""Numbers the draws of these scenes, beside those of ``evaluation_set.py``."""
SPLITS = ("scenes", "identities", "style")


def draw(artwork: sprites.Sprites, number: int = SCENES) -> list[Scene]:
    """Scenes to train a probe on, of the objects and styles of training, compressed like the evaluation set's."""
    choice, found = artwork.where(False, False), []
    for i in tqdm(range(number), desc="scenes", leave=False, mininterval=10):
        rng = np.random.default_rng([evaluation_set.SEED, STREAM, i])
        scene = scenes.draw(rng, artwork, choice, evaluation_set.SIDE)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "jpeg", quality=88)
        image = Image.open(file).convert("RGB")
        found.append(Scene(image, scene.classes, scene.instances, scene.caption))
    return found


def _described(features: Features, some: Sequence[Scene], what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (places, C) and classes (places,) of each scene."""
    middle = STEP // 2
    for scene in tqdm(some, desc=what, leave=False, mininterval=10):
        f = features.dense(to_tensor(scene.image)[None] * 2 - 1)[0]
        yield f.flatten(1).T.numpy(), scene.classes[middle::STEP, middle::STEP].ravel()


@torch.no_grad()
def probe(trained_on: Sequence[Scene], data: SceneSet, features: Features) -> dict[str, Outcome]:
    """mIoU by split."""
    rng = np.random.default_rng(0)
    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(PROBES)]
    for f, y in _described(features, trained_on, "probe"):
        for some in drawn:
            where = rng.choice(len(y), PLACES, replace=False)
            some.append((f[where], y[where]))
    probes = []
    for some in drawn:
        x, y = (np.concatenate(part) for part in zip(*some, strict=True))
        probes.append(make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)).fit(x, y))
    found = {}
    for split in SPLITS:
        described = _described(features, getattr(data, split), split)
        tables = [[confusion(y, p.predict(f), len(data.classes)) for p in probes] for f, y in described]
        found[f"mIoU, {split}"] = Outcome(np.array(tables), mean_iou)
    return found


@torch.no_grad()
def keypoints(data: SceneSet, features: Features) -> dict[str, Outcome]:
    """PCK@0.1 by split."""
    found: dict[str, list[list[int]]] = {}
    for pair in tqdm(data.pairs, desc="pairs", leave=False, mininterval=10):
        a, b = (features.matching(to_tensor(image)[None] * 2 - 1)[0] for image in (pair.source, pair.target))
        places = torch.from_numpy(pair.source_points) / torch.tensor(pair.source.size) * 2 - 1
        x0, y0, x1, y1 = pair.target_box
        right = correct_keypoints(nearest(a, b, places).numpy(), pair.target_points, max(x1 - x0, y1 - y0))
        found.setdefault(f"PCK@0.1, {pair.split}", []).append([int(right.sum()), len(right)])
    return {metric: Outcome(np.array(pairs), share) for metric, pairs in found.items()}


def artwork(folder: Path) -> sprites.Sprites:
    """The pictures that scenes are drawn from, fetched by ``sprites.py`` at the first call."""
    return sprites.load(folder)
