"""The evaluation scenes in the package: drawn objects with every pixel labelled, and matched keypoints.

``data/scenes/README.md`` says how they were made, their licence, and whose artwork is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_backbones.evaluation import labels

FOLDER = Path(__file__).with_name("data") / "scenes"


@dataclass(frozen=True)
class Scene:
    """One labelled scene of 256 x 256 pixels.

    Attributes:
        image: RGB.
        classes: (256, 256) uint8, an index into :attr:`SceneSet.classes` for every pixel; 0 is background.
        instances: (256, 256) uint8, 0 for background and 1, 2 ... for the objects from back to front.
        caption: A sentence that names its objects and its background.
    """

    image: Image.Image
    classes: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class Pair:
    """One object in two scenes, at another place and size, with another background, light and neighbours.

    Attributes:
        source, target: RGB images of 256 x 256 pixels.
        source_points, target_points: (K, 2) float32, x and y in pixels; row k is the same point of the object in both,
            visible in both.
        target_box: x0, y0, x1, y1 of the object in the target, in pixels.
        split: ``identities`` or ``style``, see :class:`SceneSet`.
    """

    source: Image.Image
    target: Image.Image
    source_points: NDArray[np.float32]
    target_points: NDArray[np.float32]
    target_box: tuple[float, float, float, float]
    split: str


@dataclass(frozen=True)
class SceneSet:
    """The evaluation set.

    Attributes:
        classes: Names of the classes; the first is background.
        probe: Scenes to train a probe on.
        scenes: New scenes of the same objects and drawing styles.
        identities: Scenes of objects that are neither in ``probe`` nor in the training set of ``tinysd``.
        style: Scenes in a drawing style that is in neither of them.
        pairs: Matched keypoints on objects, or in a style, that are not in the training set.
    """

    classes: tuple[str, ...]
    probe: tuple[Scene, ...]
    scenes: tuple[Scene, ...]
    identities: tuple[Scene, ...]
    style: tuple[Scene, ...]
    pairs: tuple[Pair, ...]


def load_scenes(folder: Path | str = FOLDER) -> SceneSet:
    """Read the evaluation set, about a second.

    Args:
        folder: Another set in the same layout.

    Raises:
        FileNotFoundError: ``folder`` holds no ``scenes.json``, or a file that it names is missing.
        ValueError: Points or boxes do not have the form of :class:`Pair`.
    """
    folder = Path(folder)
    if not (folder / "scenes.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no scenes.json, so it is not a set of evaluation scenes; leave folder= out for the one in "
            "the package"
        )
    index = json.loads((folder / "scenes.json").read_text())
    splits = {name: tuple(_scenes(folder / name, captions)) for name, captions in index["splits"].items()}
    return SceneSet(classes=tuple(index["classes"]), pairs=tuple(_pairs(folder / "pairs", index["pairs"])), **splits)


def _rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgb: Image.Image = image.convert("RGB")
    return rgb


def _scenes(folder: Path, captions: list[str]) -> Iterator[Scene]:
    for i, caption in enumerate(captions):
        with Image.open(folder / f"{i:03}.png") as labels:
            classes, instances = (np.asarray(channel) for channel in labels.split())
        yield Scene(_rgb(folder / f"{i:03}.jpg"), classes, instances, caption)


def _pairs(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Pair]:
    for i, row in enumerate(rows):
        images = {side: _rgb(folder / f"{i:03}-{side}.jpg") for side in ("source", "target")}
        where = f"{folder}, pair {i}"
        source, target = (
            labels.points(row[f"{side}_points"], f"{where}: {side}_points", image.size)
            for side, image in images.items()
        )
        if len(source) != len(target):
            raise ValueError(f"{where} has {len(source)} source and {len(target)} target points")
        box = labels.box(row["target_box"], f"{where}: target_box", target)
        yield Pair(images["source"], images["target"], source, target, box, row["split"])
