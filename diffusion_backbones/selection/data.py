"""The images that a selection looks at, and what is known of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion_backbones import images as files
from diffusion_backbones.selection.tasks import Keypoints, Match, Segmentation, Task, warped


@dataclass(frozen=True)
class Data:
    """Images, and a task on them.

    Attributes:
        images: (3, S, S) each, in [-1, 1], for the properties.
        task: For the comparison.
        source: What they are, for reports and for telling runs apart.
    """

    images: list[Tensor]
    task: Task
    source: str


def scenes(size: int, task: str = "masks", seed: int = 0) -> Data:
    """The evaluation set in the package, resized to ``size``: its 80 probe scenes for ``masks``, its 60 pairs for ``keypoints``, warps for ``warps``.

    Raises:
        ValueError: Another task.
    """
    from diffusion_backbones.scenes import load_scenes

    known = load_scenes()
    images = [to_tensor(scene.image, size) for scene in known.probe]
    if task == "masks":
        return Data(images, Segmentation(images, [_nearest(scene.classes, size) for scene in known.probe], seed), "the package's scenes, masks")
    if task == "keypoints":
        pairs = [
            _match(p.source, p.target, p.source_points, p.target_points, p.target_box, size)
            for p in known.pairs
        ]  # fmt: skip
        return Data(images, Keypoints(pairs, seed), "the package's scenes, keypoints")
    if task == "warps":
        return Data(images, Keypoints(warped(images, seed), seed), "the package's scenes, warps")
    raise ValueError(f"the package's scenes serve the tasks masks, keypoints and warps, not {task!r}")


def folder(images: Path, size: int, masks: Path | None = None, pairs: Path | None = None, seed: int = 0) -> Data:
    """A user's own images: with masks a segmentation probe, with pairs matched keypoints, with neither known warps.

    Args:
        images: A folder; every image is resized to its shorter side and its central square cut out.
        size: Side of that square in pixels.
        masks: A folder with a ``.png`` for every image, of the same relative name and size; pixels are classes from 0, 255 is ignored.
        pairs: A JSON list of objects with ``source`` and ``target``, paths relative to ``images``; ``source_points`` and ``target_points``,
            lists of [x, y] in pixels of the files; and, if wanted, ``target_box`` [x0, y0, x1, y1], by default the whole target.
        seed: Of splits and warps.

    Raises:
        FileNotFoundError: No images, or a mask or an image of a pair is missing.
        ValueError: Both masks and pairs, a mask of another size than its image or with more than one channel, or what the task cannot use.
    """
    if masks and pairs:
        raise ValueError("compare on masks or on keypoints, one at a time")
    found = files.find([images])
    pictures = [files.load(file.path) for file in found]
    tensors = [to_tensor(picture, size) for picture in pictures]
    if masks:
        labels = [_mask(masks / Path(file.name).with_suffix(".png"), picture, size) for file, picture in zip(found, pictures, strict=True)]
        return Data(tensors, Segmentation(tensors, labels, seed), f"{images}, masks {masks}")
    if pairs:
        return Data(tensors, Keypoints([_pair(images, row, size) for row in _read(pairs)], seed), f"{images}, keypoints {pairs}")
    return Data(tensors, Keypoints(warped(tensors, seed), seed), f"{images}, warps")


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: the shorter side is resized, the central square cut out."""
    from torchvision.transforms.functional import to_tensor as tensor

    out: Tensor = tensor(_square(image, size, Image.Resampling.BICUBIC)) * 2 - 1
    return out


def _square(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    scale, left, top = _geometry(image.size, size)
    box = (left / scale, top / scale, (left + size) / scale, (top + size) / scale)
    return image.resize((size, size), filter, box)


def _geometry(shape: tuple[int, int], size: int) -> tuple[float, float, float]:
    """Scale from the file to the square, and what of the resized image is left of it and above."""
    width, height = shape
    scale = size / min(width, height)
    return scale, (width * scale - size) / 2, (height * scale - size) / 2


def _nearest(mask: Any, size: int) -> Any:
    return np.asarray(_square(Image.fromarray(mask), size, Image.Resampling.NEAREST))


def _mask(path: Path, picture: Image.Image, size: int) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: every image needs a mask of the same name that ends in .png")
    with Image.open(path) as mask:
        if mask.size != picture.size:
            raise ValueError(f"{path} has {mask.size[0]} x {mask.size[1]} pixels and its image {picture.size[0]} x {picture.size[1]}")
        if mask.mode not in ("L", "P", "1"):
            raise ValueError(f"{path} has mode {mask.mode}; a mask has one channel of 8 bits, classes from 0 and 255 for what is ignored")
        return _nearest(np.array(mask, np.uint8), size)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    needed = ("source", "target", "source_points", "target_points")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and all(key in row for key in needed) for row in rows):
        raise ValueError(f"{path} must hold a list of objects with {', '.join(needed)}")
    return rows


def _pair(folder: Path, row: dict[str, Any], size: int) -> Match:
    for key in ("source", "target"):
        if not (folder / row[key]).is_file():
            raise FileNotFoundError(f"{folder / row[key]} is missing, which a pair names")
    source, target = (files.load(folder / row[key]) for key in ("source", "target"))
    box = row.get("target_box") or (0, 0, *target.size)
    return _match(source, target, np.array(row["source_points"], np.float32), np.array(row["target_points"], np.float32), box, size)


def _match(source: Image.Image, target: Image.Image, source_points: Any, target_points: Any, box: Any, size: int) -> Match:
    """Points go where their pixels go; those that are cut off are left out, in both images."""
    moved = []
    for image, points in ((source, source_points), (target, target_points)):
        scale, left, top = _geometry(image.size, size)
        moved.append((points.reshape(-1, 2) * scale - (left, top)).astype(np.float32))
    inside = np.all([((at >= 0) & (at < size)).all(1) for at in moved], 0)
    extent = max(box[2] - box[0], box[3] - box[1]) * _geometry(target.size, size)[0]
    return Match(to_tensor(source, size), to_tensor(target, size), moved[0][inside], moved[1][inside], float(extent))
