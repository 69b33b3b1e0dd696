"""The images and the task of a selection."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion_backbones.evaluation import labels
from diffusion_backbones.evaluation.scenes import load_scenes
from diffusion_backbones.extraction import images as files
from diffusion_backbones.selection.tasks import Keypoints, Match, Segmentation, Task, warped
from diffusion_backbones.spec.suggestions import closest


@dataclass(frozen=True)
class Data:
    """Images, and a task on them.

    Attributes:
        images: (3, S, S) each, in [-1, 1], on which properties are measured.
        task: The task on which activations are compared.
        source: Both in words, for reports and to tell runs apart.
    """

    images: list[Tensor]
    task: Task
    source: str


def scenes(size: int, task: str = "masks", seed: int = 0) -> Data:
    """The evaluation set in the package: its 80 probe scenes for ``masks``, its 60 pairs for ``keypoints``, warps of
    the scenes for ``warps``.

    Args:
        size: Side in pixels that the images are resized to.
        task: ``masks``, ``keypoints`` or ``warps``.
        seed: Seed of splits and warps.

    Raises:
        ValueError: The task is unknown.
    """
    known = load_scenes()
    images = [to_tensor(scene.image, size) for scene in known.probe]
    if task == "masks":
        return Data(
            images,
            Segmentation(images, [_nearest(scene.classes, size) for scene in known.probe], seed),
            "the package's scenes, masks",
        )
    if task == "keypoints":
        pairs = [
            _match(
                p.source.size,
                to_tensor(p.source, size),
                p.target.size,
                to_tensor(p.target, size),
                p.source_points,
                p.target_points,
                p.target_box,
            )
            for p in known.pairs
        ]
        return Data(images, Keypoints(pairs, seed), "the package's scenes, keypoints")
    if task == "warps":
        return Data(images, Keypoints(warped(images, seed), seed), "the package's scenes, warps")
    raise ValueError(f"task must be 'masks', 'keypoints' or 'warps' for the package's scenes, got {task!r}")


def folder(
    images: Path,
    size: int,
    masks: Path | None = None,
    pairs: Path | None = None,
    seed: int = 0,
    max_pixels: int | None = None,
) -> Data:
    """A user's own images: with masks a segmentation probe, with pairs matched keypoints, with neither known warps.

    Args:
        images: A folder; the shorter side of every image is resized, and its central square cut out.
        size: Side of that square in pixels.
        masks: A folder with a ``.png`` for every image, of the same relative name and size; pixels are classes from 0,
            255 is ignored. EXIF turns them as it turns images.
        pairs: A JSON list of objects with ``source`` and ``target``, paths relative to ``images``; ``source_points``
            and ``target_points``, equally long lists of [x, y] in pixels of the upright images; and optionally
            ``target_box`` [x0, y0, x1, y1], by default the whole target. Only the images that it names are opened, each
            once.
        seed: Seed of splits and warps.
        max_pixels: The most pixels of an image file; the default is the limit of Pillow, 179 million.

    Raises:
        FileNotFoundError: There are no images, or a mask or an image of a pair is missing.
        ValueError: Both masks and pairs are given, a mask has another size than its image, several channels or mixed
            edges, points or boxes do not have this form or lie outside their image, or the task cannot use the data.
    """
    if masks and pairs:
        raise ValueError("compare on masks or on keypoints, one at a time")
    if pairs:
        rows, seen = _read(pairs), _Squares(images, size, max_pixels)
        matches = [seen.match(row, f"{pairs}, pair {i}") for i, row in enumerate(rows)]
        return Data(
            [square for _, square in seen.opened.values()], Keypoints(matches, seed), f"{images}, keypoints {pairs}"
        )
    found = files.find([images])
    pictures = [files.load(file.path, max_pixels) for file in found]
    tensors = [to_tensor(picture, size) for picture in pictures]
    if masks:
        whole = [
            labels.read_mask(masks / Path(file.name).with_suffix(".png"), picture.size)
            for file, picture in zip(found, pictures, strict=True)
        ]
        labels.check_classes(whole, f"the masks in {masks}")
        squares = [_nearest(mask, size) for mask in whole]
        return Data(tensors, Segmentation(tensors, squares, seed), f"{images}, masks {masks}")
    return Data(tensors, Keypoints(warped(tensors, seed), seed), f"{images}, warps")


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: the shorter side is resized, the central square cut out."""
    from torchvision.transforms.functional import to_tensor as tensor

    out: Tensor = tensor(_square(image, size, Image.Resampling.BICUBIC)) * 2 - 1
    return out


def _square(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    scale, left, top = _geometry(image.size, size)
    box = (left / scale, top / scale, (left + size) / scale, (top + size) / scale)
    return image.resize((size, size), resampling, box)


def _geometry(shape: tuple[int, int], size: int) -> tuple[float, float, float]:
    """Scale from the file to the square, and the margins of the resized image to its left and above it."""
    width, height = shape
    scale = size / min(width, height)
    return scale, (width * scale - size) / 2, (height * scale - size) / 2


def _nearest(mask: Any, size: int) -> Any:
    return np.asarray(_square(Image.fromarray(mask), size, Image.Resampling.NEAREST))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    needed = ("source", "target", "source_points", "target_points")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(key in row for key in needed) for row in rows
    ):
        raise ValueError(f"{path} must hold a list of objects with {', '.join(needed)}")
    for i, row in enumerate(rows):
        for key in ("source", "target"):
            if not isinstance(row[key], str):
                raise ValueError(f"{path}, pair {i}: {key} must be the path of an image, got {row[key]!r:.80}")
        for key in row.keys() - {*needed, "target_box"}:
            if meant := closest(key, [*needed, "target_box"]):
                raise ValueError(f"{path}, pair {i} has {key!r}, which says nothing.{meant}")
    return rows


class _Squares:
    """The images that pairs name, each opened once however many pairs it is in.

    Attributes:
        opened: Name -> (width, height) of the file, and its square.
    """

    def __init__(self, folder: Path, size: int, max_pixels: int | None):
        self.folder, self.size, self.max_pixels = folder, size, max_pixels
        self.opened: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def __getitem__(self, name: str) -> tuple[tuple[int, int], Tensor]:
        if name not in self.opened:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path}, which a pair names, is missing")
            image = files.load(path, self.max_pixels)
            self.opened[name] = image.size, to_tensor(image, self.size)
        return self.opened[name]

    def match(self, row: dict[str, Any], where: str) -> Match:
        source, target = self[row["source"]], self[row["target"]]
        at = labels.points(row["source_points"], f"{where}: source_points", source[0])
        to = labels.points(row["target_points"], f"{where}: target_points", target[0])
        if len(at) != len(to):
            raise ValueError(
                f"{where} has {len(at)} source and {len(to)} target points; row k of both is the same point of the "
                "object"
            )
        given = row.get("target_box")
        box = (0, 0, *target[0]) if given is None else labels.box(given, f"{where}: target_box", to, target[0])
        return _match(*source, *target, at, to, box)


def _match(
    source_shape: tuple[int, int],
    source: Tensor,
    target_shape: tuple[int, int],
    target: Tensor,
    source_points: Any,
    target_points: Any,
    box: Any,
) -> Match:
    """Move points with their pixels, and leave out those that are cut off in either image."""
    moved, size = [], target.shape[-1]
    for shape, points in ((source_shape, source_points), (target_shape, target_points)):
        scale, left, top = _geometry(shape, size)
        moved.append((points.reshape(-1, 2) * scale - (left, top)).astype(np.float32))
    inside = np.all([((at >= 0) & (at < size)).all(1) for at in moved], 0)
    extent = max(box[2] - box[0], box[3] - box[1]) * _geometry(target_shape, size)[0]
    return Match(source, target, moved[0][inside], moved[1][inside], float(extent))
