"""A backbone for detectron2: alone, under FPN or under ViTDet's pyramid, from a ``CfgNode`` or a ``LazyConfig``.

::

    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_diffusion_fpn_backbone"
    cfg.MODEL.DIFFUSION.NAME = "sd15_gdf"

The keywords of ``create_model`` that decide what is computed are keys of ``MODEL.DIFFUSION``, in capitals.
"""
# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.factory.entry_points import create_model
from diffusion_backbones.factory.options import OVERRIDES
from diffusion_backbones.integrations import missing
from diffusion_backbones.ops.pixel_values import within
from diffusion_backbones.spec.input_format import InputFormat

try:
    from detectron2.config import CfgNode
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
except ImportError as error:
    itself = "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"  # it is not on PyPI
    raise ImportError(f"{missing('detectron2', 'detectron2', error)} && {itself}") from error

__all__ = [
    "Detectron2Backbone",
    "add_diffusion_config",
    "build_diffusion_backbone",
    "build_diffusion_fpn_backbone",
    "build_retinanet_diffusion_fpn_backbone",
]


class Detectron2Backbone(Backbone):  # type: ignore[misc]
    """A backbone whose maps are named by their stride: ``{"s8": ..., "s16": ..., "s32": ...}``.

    Args:
        name, pretrained, **kwargs: As in :func:`~diffusion_backbones.create_model`; numbers, strings and lists, as
            LazyConfig needs.
        pixel_mean, pixel_std: Mean and deviation, for pixels of 0 to 255, by which the model around it normalises
            images, in the order of ``input_format``.
        input_format: ``"RGB"`` or ``"BGR"``, like that model's ``input_format`` and the data loader's
            ``INPUT.FORMAT``.

    Raises:
        ValueError: Two levels have one stride, or the images are neither RGB nor BGR; also as ``create_model``.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        *,
        pixel_mean: Sequence[float] = (127.5, 127.5, 127.5),
        pixel_std: Sequence[float] = (127.5, 127.5, 127.5),
        input_format: str = "RGB",
        **kwargs: Any,
    ):
        super().__init__()
        if input_format not in ("RGB", "BGR") or not len(pixel_mean) == len(pixel_std) == 3:
            raise ValueError(
                "the image encoder takes three channels, so INPUT.FORMAT must be 'RGB' or 'BGR', and MODEL.PIXEL_MEAN "
                f"and MODEL.PIXEL_STD three numbers each; got {input_format!r}, {list(pixel_mean)} and "
                f"{list(pixel_std)}"
            )
        bgr = input_format == "BGR"
        mean, std = ([value / 255 for value in values] for values in (pixel_mean, pixel_std))
        (m0, m1, m2), (s0, s1, s2) = (mean[::-1], std[::-1]) if bgr else (mean, std)  # red first
        self.net = create_model(name, pretrained, input_format=InputFormat((m0, m1, m2), (s0, s1, s2), bgr), **kwargs)
        strides = self.net.feature_info.reduction()
        if len(set(strides)) < len(strides):
            raise ValueError(
                f"maps are named by their stride, and {name} has strides {strides}; {_advice(strides)}, or choose "
                "levels with OUT_INDICES"
            )
        self._shapes = {
            f"s{s}": ShapeSpec(channels=c, stride=s)
            for c, s in zip(self.net.feature_info.channels(), strides, strict=True)
        }

    def output_shape(self) -> dict[str, Any]:
        """Name -> ``ShapeSpec`` with channels and stride, fine to coarse."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this. FPN pads to less, which does no harm: the network pads the rest."""
        return math.lcm(self.net.size_divisibility, *(shape.stride for shape in self._shapes.values()))

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How detectron2 pads images: to a multiple of ``size_divisibility``."""
        return {"size_divisibility": self.size_divisibility}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images from ``preprocess_image`` -> their pyramid.

        Args:
            x: (B, 3, H, W), any H and W, normalised by the mean and deviation of the constructor.

        Returns:
            Name -> (B, C, ceil(H / s), ceil(W / s)), in the dtype of ``x`` whatever that of the network.

        Raises:
            ValueError: The values cannot come from that normalisation.
        """
        expected = self.net.input_format
        if (
            not torch.compiler.is_compiling()
            and not x.is_meta
            and bool(torch.isfinite(x).all())
            and not within(x, expected)
        ):
            low, high = expected.range()
            raise ValueError(
                f"the backbone expects {'BGR' if expected.bgr else 'RGB'} in [{low:.4g}, {high:.4g}], and the images "
                f"reach from {x.min():.4g} to {x.max():.4g}. The model's INPUT.FORMAT, MODEL.PIXEL_MEAN and "
                "MODEL.PIXEL_STD (in a LazyConfig input_format, pixel_mean and pixel_std) must be the backbone's: "
                "'RGB', [127.5] * 3 and [127.5] * 3 by default."
            )
        return {name: level.to(x.dtype) for name, level in zip(self._shapes, self.net(x), strict=True)}


def add_diffusion_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DIFFUSION``, and set ``INPUT.FORMAT``, ``PIXEL_MEAN`` and ``PIXEL_STD`` so that images are RGB in
    [-1, 1]. Set other values afterwards; the backbone undoes their normalisation.
    """
    optional = (
        "CHECKPOINT_PATH",
        "CACHE_DIR",
        "RECIPE",
        "OUT_INDICES",
        "OUT_STRIDES",
        "DTYPE",
        *map(str.upper, OVERRIDES),
    )
    cfg.MODEL.DIFFUSION = CfgNode(
        {"NAME": "sd15_gdf", "PRETRAINED": True, "TRAINABLE": False, "ENCODER_LEVELS": False, **dict.fromkeys(optional)}
    )
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3


def build_diffusion_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:  # noqa: ARG001  # detectron2's
    """Build the backbone alone: maps s8, s16, ..."""
    keywords = {key.lower(): value for key, value in cfg.MODEL.DIFFUSION.items()}
    return Detectron2Backbone(
        **keywords, pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD, input_format=cfg.INPUT.FORMAT
    )


def build_diffusion_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone with FPN, for R-CNNs and semantic FPN. Max pooling gives one more level: p3 to p6 for strides
    8, 16, 32.
    """
    bottom_up = build_diffusion_backbone(cfg, input_shape)
    names, top_block = _in_features(cfg, bottom_up), LastLevelMaxPool()
    top_block.in_feature = f"p{bottom_up.output_shape()[names[-1]].stride.bit_length() - 1}"
    return _fpn(cfg, bottom_up, names, top_block)


def build_retinanet_diffusion_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone with FPN, and two more levels by convolutions on the coarsest map: p3 to p7 for strides 8, 16,
    32.
    """
    bottom_up = build_diffusion_backbone(cfg, input_shape)
    names = _in_features(cfg, bottom_up)
    return _fpn(
        cfg,
        bottom_up,
        names,
        LastLevelP6P7(bottom_up.output_shape()[names[-1]].channels, cfg.MODEL.FPN.OUT_CHANNELS, names[-1]),
    )


def _fpn(cfg: CfgNode, bottom_up: Detectron2Backbone, names: list[str], top_block: Any) -> FPN:
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, names, fpn.OUT_CHANNELS, norm=fpn.NORM, top_block=top_block, fuse_type=fpn.FUSE_TYPE)


def _in_features(cfg: CfgNode, bottom_up: Detectron2Backbone) -> list[str]:
    """``MODEL.FPN.IN_FEATURES``, or all maps where that is empty, if FPN can take them."""
    shapes, name = bottom_up.output_shape(), cfg.MODEL.DIFFUSION.NAME
    names = list(cfg.MODEL.FPN.IN_FEATURES) or list(shapes)
    if absent := [n for n in names if n not in shapes]:
        raise ValueError(
            f"{name} returns {', '.join(shapes)}, and MODEL.FPN.IN_FEATURES names {', '.join(absent)}; leave it empty "
            "or set OUT_STRIDES"
        )
    strides = [shapes[n].stride for n in names]
    if strides != [2 ** (strides[0].bit_length() - 1 + i) for i in range(len(strides))]:
        raise ValueError(
            f"FPN needs strides that are powers of two and double from level to level, and {name} has {strides}; "
            f"{_advice(strides)}"
        )
    return names


def _advice(strides: Sequence[int]) -> str:
    first, last = (stride.bit_length() - 1 for stride in (min(strides), max(strides)))
    return f"set OUT_STRIDES (out_strides) to {[2**i for i in range(first, last + 1)]}"


for build in (build_diffusion_backbone, build_diffusion_fpn_backbone, build_retinanet_diffusion_fpn_backbone):
    BACKBONE_REGISTRY.register(build)
