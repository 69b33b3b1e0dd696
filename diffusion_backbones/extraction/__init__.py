"""Folders of images -> one ``.safetensors`` of features per image.

::

    features/
      manifest.json                       settings, versions, and the status of every image
      street/01.jpg.safetensors           level0 (C, h, w), level1 ...; metadata: strides, sizes, backbone, weights

A file is written atomically and records its settings and its image. So a run can be stopped at any time and run
again: finished images are skipped, changed ones are made again, and no folder mixes settings. Several processes may
share a folder. Features are written image by image, so memory does not grow with their number.

::

    images      finding image files and making them the input of a backbone
    prefetch    bounded prefetching, so that reading, computing and writing happen at once
    stages      the three stages: a file is read, a batch is computed, its features are written
    settings    all that features depend on
    folder      the output folder: manifest, finished images
    rerun       whether all is finished, found without loading the network
    run         the whole extraction
    fitting     principal components of a backbone, fitted on image files
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_backbones.extraction import images
from diffusion_backbones.extraction.folder import MANIFEST
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.settings import Settings

if TYPE_CHECKING:
    from diffusion_backbones.extraction.fitting import fit
    from diffusion_backbones.extraction.run import Summary, default_workers, extract

_LAZY = {"Summary": "run", "default_workers": "run", "extract": "run", "fit": "fitting"}  # what needs torch
__all__ = ["MANIFEST", "ImageFile", "Settings", "Summary", "default_workers", "extract", "fit", "images"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
