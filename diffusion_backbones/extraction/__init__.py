"""Folders of images -> one ``.safetensors`` of features per image.

::

    features/
      manifest.json                       settings, versions, and what became of every image
      street/01.jpg.safetensors           level0 (C, h, w), level1 ...; metadata: strides, sizes, backbone, weights

A file is there whole or not at all, and says by which settings it was made. So a run can be stopped in any way and
started again: what is finished is skipped, and nothing is mixed. Features are written image by image and never
gathered.

::

    overlap     a map that is ahead of who takes from it, so that reading, computing and writing happen at once
    stages      the three: a file is read, a batch is computed, its features are written
    folder      where they are written: settings, manifest, what is finished
    run         all of it
"""

from diffusion_backbones.extraction.folder import MANIFEST, Settings
from diffusion_backbones.extraction.run import Summary, default_workers, extract

__all__ = ["MANIFEST", "Settings", "Summary", "default_workers", "extract"]
