"""Image files: find them, open them upright, and turn them into the input of a backbone."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffusion_backbones.ops import image_decoding
from diffusion_backbones.ops.describe import gigabytes
from diffusion_backbones.ops.free_memory import free_memory

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_backbones.spec.declaration import Declaration
    from diffusion_backbones.spec.fusion import Fusion

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Common suffixes of images; a folder is searched for all that the installed Pillow reads."""

OF_SYSTEMS = ("thumbs.db", "desktop.ini")
"""Files that systems leave in folders, as they do hidden ones."""

DECODING = 16
"""Bytes of memory for every pixel of an image file until it is RGB, measured."""

ELONGATED = 8
"""How many times as long as wide an image is from which on it is cut before it is resized."""

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

    A file keeps its name, an image in a folder its path relative to that folder. Images in a folder are known by their
    suffix, which is one that the installed Pillow reads; how many other files were left out is logged as a warning.

    Args:
        places: Files and folders.

    Raises:
        FileNotFoundError: A place does not exist, or a folder holds no image.
        ValueError: Two different images would have the same name.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist")
        for name, path in (_images_in(place) if place.is_dir() else {place.name: place}).items():
            if name in found and not path.samefile(found[name]):
                raise ValueError(
                    f"{found[name]} and {path} would both be kept as {name!r}; give the folder above them, or run twice"
                )
            found[name] = path
    return [ImageFile(path, name) for name, path in found.items()]


def _images_in(folder: Path) -> dict[str, Path]:
    """Relative name -> path of the images below a folder; the others are counted and told."""
    images, others = {}, Counter[str]()
    for path in _below(folder):
        if path.suffix.lower() in image_decoding.readable_suffixes():
            images[path.relative_to(folder).as_posix()] = path
        elif path.name.lower() not in OF_SYSTEMS:
            others[path.suffix.lower() or "without suffix"] += 1
    left_out = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
    heif = f"; {image_decoding.INSTALL_HEIF} reads HEIF images" if others.keys() & {*image_decoding.HEIF} else ""
    if not images:
        holds = f"; it holds {left_out}{heif}" if left_out else ""
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(SUFFIXES)} ...){holds}")
    if left_out:
        log.warning("%s: left out what is no image by its suffix: %s%s", folder, left_out, heif)
    return images


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and its sub-folders; links are followed, but never in a circle."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(here, f) for f in sorted(files) if not f.startswith("."))
        seen.add(real)


def load(path: str | Path, max_pixels: int | None = None, bytes_per_pixel: float = DECODING) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF orientation says; what is transparent lies on white.

    Args:
        path: The file. It may have any metadata.
        max_pixels: The most pixels that it may have; the default is the limit of Pillow, 179 million.
        bytes_per_pixel: Memory that its pixels take here, and in what comes next; it is refused if that is more than
            is free.

    Raises:
        ValueError: The file is not an image, is damaged, has too many pixels, or has more than 8 bits per channel,
            which would be clipped to white.
    """
    most = image_decoding.most_pixels() if max_pixels is None else max_pixels

    def check(image: Image.Image) -> None:
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits first")
        pixels, sides = image.width * image.height, f"{image.width} x {image.height}"
        if most is not None and pixels > most:
            raise ValueError(
                f"it has {sides} pixels, {pixels} in all, and the limit is {most}; if you trust it, "
                f"--max-pixels {pixels}, or max_pixels= in Python, reads it"
            )
        needed, free = int(pixels * bytes_per_pixel), free_memory()
        if needed > free:
            raise ValueError(
                f"its {sides} pixels need {gigabytes(needed)} of memory here, and {gigabytes(free)} are free; give a "
                "smaller --size or a smaller image"
            )

    try:
        return image_decoding.read(Path(path), check)
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ValueError(f"{path} cannot be read as an image: {_reason(Path(path), error)}") from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it does not fit the memory"
    if path.suffix.lower() in image_decoding.HEIF and path.suffix.lower() not in image_decoding.readable_suffixes():
        return f"it is in the HEIF format, which needs another library: {image_decoding.INSTALL_HEIF}"
    return str(error) or type(error).__name__


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
        keys = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
        shaped = create_transform((3, size, size), **{key: config[key] for key in keys})
        resampling = Image.Resampling[config["interpolation"].upper()]
        preprocess = Compose([Lambda(partial(_cut, size=size, resampling=resampling)), shaped])
    return Compose([preprocess, Lambda(lambda x: x.flip(0))]) if bgr else preprocess


def _cut(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """A very long image as its central square, as if it had been resized first, which would take far more memory; any
    other as it is, for its pixels would differ in rounding.
    """
    if max(image.size) <= ELONGATED * min(image.size):
        return image
    (left, right, *across), (top, bottom, *down) = (_window(side, min(image.size), size) for side in image.size)
    image = image.crop((left, top, right, bottom))
    image = image.resize((size, image.height), resampling, (across[0], 0, across[1], image.height))  # in Pillow's order
    return image.resize((size, size), resampling, (0, down[0], size, down[1]))


def _window(side: int, shorter: int, size: int) -> tuple[int, int, float, float]:
    """Along one side of an image whose shorter side is resized to ``size``: begin and end of what the central square
    needs in whole pixels, and begin and end of the square in that part.
    """
    resized = int(size * side / shorter)
    scale, at = side / resized, round((resized - size) / 2)
    begin, end, support = at * scale, (at + size) * scale, 4 * max(scale, 1)
    first, last = max(0, math.floor(begin - support)), min(side, math.ceil(end + support))
    return first, last, begin - first, end - first


def too_large(path: Path, image: Image.Image, declaration: Declaration | Fusion) -> str:
    """Advice for an image with many more pixels than the recipe was made for, or an empty string."""
    side = declaration.input_size
    if image.width * image.height <= LARGE * side**2:
        return ""
    return (
        f"{path} has {image.width} x {image.height} pixels and {declaration.name} was made for {side} x {side}: "
        f"--size {side} takes far less time and memory"
    )
