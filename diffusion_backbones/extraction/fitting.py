"""The principal components of a backbone or a fusion, fitted on image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from diffusion_backbones.backbone.fusion import FusedBackbone
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.extraction import images

B = TypeVar("B", DiffusionBackbone, FusedBackbone)


def fit(
    backbone: B,
    places: str | Path | Iterable[str | Path],
    *,
    size: int | None = None,
    max_pixels: int | None = None,
    **call: Any,
) -> B:
    """Fit the ``components`` of a backbone on images, all together; they are saved with it.

    Args:
        backbone: Built with ``components=``.
        places: A folder, a file, or several.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps every image's own size.
        max_pixels: The most pixels of an image file; the default is the limit of Pillow, 179 million.
        **call: Keywords of a call, such as ``prompt``.

    Returns:
        The backbone.

    Raises:
        FileNotFoundError: A place does not exist, or a folder holds no image.
        ValueError: A file is no image, or they have too few places for so many components.
    """
    files = images.find([places] if isinstance(places, (str, os.PathLike)) else places)
    preprocess = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)

    def batches() -> Iterator[Tensor]:
        for file in files:
            yield preprocess(images.load(file.path, max_pixels))[None].to(backbone.device)

    return backbone.fit(batches(), **call)
