"""Importing this makes detectron2 importable: the one that is installed, or else a release from PyPI without its
compiled operators.

detectron2 is not on PyPI under its own name. ``pb1-detectron2`` is release 0.6 without its C++ sources, which therefore
cannot be installed, but whose Python runs from a folder; ROIAlign and non-maximum suppression come from torchvision.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import PIL.Image
import unpacked

if importlib.util.find_spec("detectron2") is None:
    unpacked.add(
        "pb1-detectron2-0.6",
        "pb1-detectron2==0.6 --hash=sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29",
    )
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]  # which the release still names, and Pillow dropped
