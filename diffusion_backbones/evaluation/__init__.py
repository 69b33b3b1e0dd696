"""Measurements of backbones: speed, memory, deviations, pictures, metrics, and the scenes that they are made on.

::

    benchmark             how long a backbone takes, beside the usual ways to get the same features
    benchmark_table       its results as rows of a CSV
    memory_benchmark      seconds to load and peak memory
    deviation             how far the features of one backbone are from those of another
    visualize             pictures of features
    concepts              pictures of where words are
    principal_components  maps as colors
    metrics               mIoU and PCK
    labels                points, boxes and masks, in their form or refused
    csv_table             tables that grow from run to run
    scenes                the evaluation set in the package
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_backbones.evaluation.benchmark import Setting, Timing, bench
    from diffusion_backbones.evaluation.deviation import Deviation, deviations
    from diffusion_backbones.evaluation.memory_benchmark import Footprint
    from diffusion_backbones.evaluation.metrics import class_iou, correct_keypoints, mean_iou, pck
    from diffusion_backbones.evaluation.principal_components import pca_rgb, shared_rgb
    from diffusion_backbones.evaluation.scenes import Pair, Scene, SceneSet, load_scenes
    from diffusion_backbones.evaluation.visualize import Panel, panels, picture, sheet

_LAZY = {  # the scenes and the metrics need no torch, and most users of a room need one module of it
    "benchmark": ("Setting", "Timing", "bench"),
    "deviation": ("Deviation", "deviations"),
    "memory_benchmark": ("Footprint",),
    "metrics": ("class_iou", "correct_keypoints", "mean_iou", "pck"),
    "scenes": ("Pair", "Scene", "SceneSet", "load_scenes"),
    "principal_components": ("pca_rgb", "shared_rgb"),
    "visualize": ("Panel", "panels", "picture", "sheet"),
}
__all__ = [
    "Deviation",
    "Footprint",
    "Pair",
    "Panel",
    "Scene",
    "SceneSet",
    "Setting",
    "Timing",
    "bench",
    "class_iou",
    "correct_keypoints",
    "deviations",
    "load_scenes",
    "mean_iou",
    "panels",
    "pca_rgb",
    "pck",
    "picture",
    "shared_rgb",
    "sheet",
]


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
