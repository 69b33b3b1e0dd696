"""Folders of images -> one ``.safetensors`` of features per image.

::

    features/
      manifest.json                       settings, versions, and the status of every image
      street/01.jpg.safetensors           level0 (C, h, w), level1 ...; metadata: strides, sizes, backbone, weights

A file is written atomically and records its settings. So a run can be stopped at any time and run again: finished
images are skipped, and no folder mixes settings. Features are written image by image, so memory does not grow with
their number.

::

    images      finding and opening image files
    prefetch    bounded prefetching, so that reading, computing and writing happen at once
    stages      the three stages: a file is read, a batch is computed, its features are written
    folder      the output folder: settings, manifest, finished images
    run         the whole extraction
"""

from diffusion_backbones.extraction import images
from diffusion_backbones.extraction.folder import MANIFEST, Settings
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.run import Summary, default_workers, extract

__all__ = ["MANIFEST", "ImageFile", "Settings", "Summary", "default_workers", "extract", "images"]
