"""A backbone under torchvision's detectors and DeepLabV3.

::

    body = PyramidFPN(create_model("sd15_gdf", pretrained=True, out_strides=(4, 8, 16, 32)))
    detector = FasterRCNN(body, num_classes=91, **body.transform)

The detectors take images in [0, 1] and normalise them by ImageNet's mean and deviation without ``**body.transform``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.ops.pixel_values import within
from diffusion_backbones.spec.levels import take

EXTRA = {"pool": ("pool",), "p6p7": ("p6", "p7"), None: ()}
"""Choices for the maps behind the last level of a :class:`PyramidFPN`, each with twice the stride of the one before."""

__all__ = ["NamedLevels", "PyramidFPN"]


class NamedLevels(nn.Module):
    """Some levels of a backbone by name, as ``IntermediateLayerGetter`` returns them. torchvision's ``DeepLabV3`` and
    ``FCN`` take ``NamedLevels(backbone, out=-1, aux=-2)``.

    Args:
        backbone: From :func:`~diffusion_backbones.create_model`.
        **levels: Name -> position in the pyramid, fine to coarse; -1 is the coarsest.

    Attributes:
        channels, strides: Name -> channels and stride of the map.

    Raises:
        ValueError: The backbone has no such level; the error lists its levels.
    """

    def __init__(self, backbone: Backbone, **levels: int):
        super().__init__()
        info = backbone.feature_info
        maps = [
            f"{i}: {channels} channels at stride {stride}"
            for i, (channels, stride) in enumerate(zip(info.channels(), info.reduction(), strict=True))
        ]
        for name, level in levels.items():
            if not -len(maps) <= level < len(maps):
                has = f"{backbone.declaration.name} has {', '.join(maps)}"
                raise ValueError(
                    f"{name}={level} is not a level: {has}. Take another recipe, or create_model(..., "
                    "out_strides=(...)) to resample."
                )
        self.backbone, self.levels = backbone, {name: level % len(maps) for name, level in levels.items()}
        self.channels = {name: info.channels()[level] for name, level in self.levels.items()}
        self.strides = {name: info.reduction()[level] for name, level in self.levels.items()}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images -> their maps by name.

        Args:
            x: (B, 3, H, W) in [-1, 1], or in the backbone's ``input_format``.

        Returns:
            Name -> (B, C, ceil(H / stride), ceil(W / stride)).

        Raises:
            ValueError: Values are out of that range, as after ImageNet's normalisation.
        """
        expected = self.backbone.input_format
        if not torch.compiler.is_compiling() and not x.is_meta and not within(x, expected):
            (low, high), span = expected.range(), f"[{float(x.min()):.2f}, {float(x.max()):.2f}]"
            raise ValueError(
                f"this backbone takes images in [{low:.4g}, {high:.4g}], got values in {span}; normalise them so, in a "
                "detector with **PyramidFPN.transform"
            )
        needed = sorted(set(self.levels.values()))
        maps = dict(zip(needed, self.backbone(x, needed), strict=True))
        return OrderedDict((name, maps[level]) for name, level in self.levels.items())


class PyramidFPN(nn.Module):
    """A backbone and a feature pyramid network, for ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet``, ``FCOS``.

    Their default anchors expect five maps: strides 4, 8, 16, 32 and ``"pool"`` in the R-CNNs, strides 8, 16, 32 and
    ``"p6p7"`` in RetinaNet and FCOS. For other strides use :meth:`anchors` and :meth:`roi_align`.

    Args:
        backbone: From :func:`~diffusion_backbones.create_model`.
        out_channels: Channels of every map.
        levels: Positions of the backbone's maps, fine to coarse; all by default.
        extra: Maps behind them: ``"pool"`` subsamples the last, ``"p6p7"`` learns two more maps, None adds nothing.

    Attributes:
        names, strides: Names and strides of the maps that :meth:`forward` returns.
        transform: Keywords of the detectors: mean, standard deviation, and a ``size_divisible`` that every stride
            divides.

    Raises:
        ValueError: The level or ``extra`` is unknown, or the strides do not grow.
    """

    def __init__(
        self,
        backbone: Backbone,
        out_channels: int = 256,
        levels: int | Sequence[int] | None = None,
        extra: str | None = "pool",
    ):
        super().__init__()
        if extra not in EXTRA:
            raise ValueError(f"extra must be 'pool', 'p6p7' or None, got {extra!r}")
        strides = backbone.feature_info.reduction()
        chosen = take(levels, len(strides))
        self.body = NamedLevels(backbone, **{str(i): level for i, level in enumerate(chosen)})
        self.roi_names = list(self.body.strides)
        self.strides = list(self.body.strides.values())
        if self.strides != sorted(set(self.strides)):
            raise ValueError(
                f"the strides of an FPN's levels must grow, got {self.strides} from levels={list(chosen)} of "
                f"{backbone.declaration.name}, which has {strides}; choose one level of each stride with levels=[...]"
            )
        self.strides += [self.strides[-1] * 2**i for i in range(1, len(EXTRA[extra]) + 1)]
        self.names = [*self.roi_names, *EXTRA[extra]]
        blocks = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(out_channels, out_channels) if extra else None
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(list(self.body.channels.values()), out_channels, extra_blocks=blocks)
        cfg = backbone.pretrained_cfg
        divisible = math.lcm(backbone.size_divisibility, *self.strides)
        self.transform: dict[str, Any] = {
            "image_mean": list(cfg["mean"]),
            "image_std": list(cfg["std"]),
            "size_divisible": divisible,
        }

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> name -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        out: OrderedDict[str, Tensor] = self.fpn(self.body(x))
        return out

    def anchors(self, scale: float = 8, ratios: Sequence[float] = (0.5, 1.0, 2.0), octaves: int = 1) -> AnchorGenerator:
        """One set of anchors for each map, of ``scale`` x stride pixels.

        The scales of torchvision's own models: 8 for the R-CNNs, 4 with ``octaves=3`` for RetinaNet, 1 with
        ``ratios=(1.0,)`` for FCOS.
        """
        sizes = tuple(tuple(scale * stride * 2 ** (i / octaves) for i in range(octaves)) for stride in self.strides)
        return AnchorGenerator(sizes, (tuple(ratios),) * len(sizes))

    def roi_align(self, output_size: int, sampling_ratio: int = 2) -> MultiScaleRoIAlign:
        """The RoI pooling over the backbone's levels, for a box head (``output_size`` 7) or a mask head (14)."""
        return MultiScaleRoIAlign(self.roi_names, output_size, sampling_ratio)
