"""Importing this makes mmdet importable: the one that is installed, or else onedl-mmdetection from a folder.

Its dependencies want an older numpy, and it needs operators of mmcv that onedl-mmcv on PyPI has not compiled. Mask
R-CNN and RetinaNet use two of them, which are torchvision's here: non-maximum suppression and RoIAlign. That with a
gradient mmcv itself takes from torchvision, with ``use_torchvision=True``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import unpacked


class Operators(types.ModuleType):
    """``mmcv._ext``: what is not defined is there, as mmcv asserts at import, and cannot be called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv's {name} is not compiled")

        return absent

    def nms(self, boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
        """(N, 4) and (N,) -> the indices that stay, by falling score."""
        assert offset == 0
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    def roi_align_forward(
        self, maps: torch.Tensor, rois: torch.Tensor, output: torch.Tensor, *argmax: torch.Tensor, **how: Any
    ) -> None:
        """Pool by averages, into ``output``. There is no backward: it is for the masks that are learned from."""
        assert how["pool_mode"] == 1
        size = (how["aligned_height"], how["aligned_width"])
        output.copy_(
            torchvision.ops.roi_align(maps, rois, size, how["spatial_scale"], how["sampling_ratio"], how["aligned"])
        )


if importlib.util.find_spec("mmdet") is None:
    unpacked.add(
        "onedl_mmdetection-3.5.1",
        "onedl-mmdetection==3.5.1 --hash=sha256:2cd7fae8f74f644dd7a1f71cebc2cf531c330c6e027ffada46ee3d34ba7642dc",
    )
if importlib.util.find_spec("mmcv._ext") is None:
    sys.modules["mmcv._ext"] = Operators("mmcv._ext")
    sys.modules["mmcv._ext"].__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)  # mmengine asks for it
