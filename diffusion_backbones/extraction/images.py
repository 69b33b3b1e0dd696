"""Image files: find them, open them upright, and turn them into the input of a backbone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_backbones.spec.declaration import Declaration

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of the images in a folder. A file that is given by itself may have any name."""

LARGE = 4
"""How many times the pixels of its recipe an image may have before the user is advised to use ``--size``."""


@dataclass(frozen=True)
class ImageFile:
    """One image.

    Args:
        path: Its file.
        name: The relative name under which its results are kept: ``street/01.jpg``.
    """

    path: Path
    name: str


def find(places: Iterable[str | Path]) -> list[ImageFile]:
    """The given files, and every image below the given folders, sorted and without hidden ones.

    A file keeps its name, an image in a folder its path relative to that folder.

    Args:
        places: Files and folders.

    Raises:
        FileNotFoundError: A place does not exist, or a folder holds no image.
        ValueError: Two different images would have the same name.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        images = (
            {path.relative_to(place).as_posix(): path for path in _below(place)}
            if place.is_dir()
            else {place.name: place}
        )
        if not images or not place.exists():
            raise FileNotFoundError(
                f"{place} holds no image ({', '.join(SUFFIXES)})" if place.is_dir() else f"{place} does not exist"
            )
        for name, path in images.items():
            if name in found and not path.samefile(found[name]):
                raise ValueError(
                    f"{found[name]} and {path} would both be kept as {name!r}; give the folder above them, or run twice"
                )
            found[name] = path
    return [ImageFile(path, name) for name, path in found.items()]


def _below(folder: Path) -> Iterator[Path]:
    """The images in a folder and its sub-folders; links are followed, but never in a circle."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(here, f) for f in sorted(files) if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        seen.add(real)


def load(path: str | Path) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF orientation says. Transparency is dropped, as torchvision and
    timm do.

    Raises:
        ValueError: The file is not an image, is damaged, or has more than 8 bits per channel, which would be clipped
            to white.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits first")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def transform(config: dict[str, Any], size: int | None, bgr: bool = False) -> Callable[[Image.Image], Tensor]:
    """The preprocessing of a backbone: PIL image -> (3, H, W) float32, in [-1, 1] for mean = std = 0.5.

    Args:
        config: The backbone's ``pretrained_cfg``.
        size: The shorter side is resized to this many pixels and the central square is cut out, exactly as
            ``timm.data.create_transform`` does. None keeps the image's own size.
        bgr: Whether blue comes first.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Lambda, Normalize, ToTensor

    preprocess: Callable[[Image.Image], Tensor]
    if size is None:
        preprocess = Compose([ToTensor(), Normalize(config["mean"], config["std"])])
    else:
        preprocess = create_transform(
            (3, size, size), **{key: config[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
        )
    return Compose([preprocess, Lambda(lambda x: x.flip(0))]) if bgr else preprocess


def too_large(path: Path, image: Image.Image, declaration: Declaration) -> str:
    """Advice for an image with many more pixels than the recipe was made for, or an empty string."""
    side = declaration.input_size
    if image.width * image.height <= LARGE * side**2:
        return ""
    return (
        f"{path} has {image.width} x {image.height} pixels and {declaration.name} was made for {side} x {side}: "
        f"--size {side} takes far less time and memory"
    )
