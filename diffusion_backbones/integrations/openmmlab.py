"""``type="DiffusionBackbone"`` for mmsegmentation, mmdetection and other libraries that read mmengine's registry.

In a config::

    custom_imports = dict(imports=["diffusion_backbones.integrations.openmmlab"])
    data_preprocessor = dict(type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
    backbone = dict(type="DiffusionBackbone", name="sd15_gdf", pretrained=True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.factory.entry_points import create_model
from diffusion_backbones.integrations import missing

try:
    from mmengine.model import BaseModule
    from mmengine.registry import MODELS
except ImportError as error:
    raise missing("mmengine", "openmmlab", error) from error


__all__ = ["OpenMMLabBackbone"]


@MODELS.register_module(name="DiffusionBackbone")  # the root, in which mmseg's and mmdet's registries look too
class OpenMMLabBackbone(BaseModule):  # type: ignore[misc]
    """A backbone with the interface of OpenMMLab: it returns a tuple of maps, fine to coarse.

    Args:
        name, pretrained, out_indices, out_strides: As in :func:`~diffusion_backbones.create_model`.
        input_scale: Resize images by this factor, bilinearly, before the network sees them: 2 for crops of 512 pixels
            and a network of 1024. Strides are those of the resized image.
        in_channels: OpenMMLab's name for the channels of the image; it must be 3.
        init_cfg: ``dict(type="Pretrained", checkpoint=path)``, OpenMMLab's way of writing ``checkpoint_path=path``.
        **kwargs: Every other keyword of ``create_model``: ``recipe``, ``prompt``, ``timestep``, ``dtype``,
            ``trainable``, ...

    Attributes:
        net: The backbone. If frozen, it stays in eval mode and without gradients, whatever the runner calls.

    Raises:
        ValueError: ``init_cfg`` is of another kind, or ``input_scale`` is not positive; also as ``create_model``.
        TypeError: ``pretrained`` is not a bool.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        *,
        out_indices: int | Sequence[int] | None = None,
        out_strides: Sequence[int] | None = None,
        input_scale: float = 1,
        in_channels: int = 3,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if not isinstance(pretrained, bool):
            raise TypeError(
                f"pretrained must be True or False, got {pretrained!r}; pass weights of your own as "
                f"checkpoint_path={pretrained!r}"
            )
        if not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale must be a positive factor, got {input_scale!r}")
        if init_cfg is not None:
            if init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}:
                raise ValueError(
                    "a backbone loads all of its weights at once, so init_cfg must be None (with pretrained=True for "
                    "the published weights) or dict(type='Pretrained', checkpoint='folder or .safetensors file'), got "
                    f"{dict(init_cfg)}"
                )
            if kwargs.get("checkpoint_path"):
                raise ValueError(
                    f"give either init_cfg={dict(init_cfg)} or checkpoint_path={kwargs['checkpoint_path']!r}, not both"
                )
            kwargs["checkpoint_path"] = init_cfg["checkpoint"]
        self.input_scale = input_scale
        self.net = create_model(
            name, pretrained, out_indices=out_indices, out_strides=out_strides, in_chans=in_channels, **kwargs
        )
        self.is_init = True  # so that no init_weights() touches it

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Preprocessed images -> their pyramid.

        Args:
            x: (B, 3, H, W) RGB in [-1, 1], or in the backbone's ``input_format``, any H and W.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), in the dtype of ``x`` whatever that of the network, so that
            float32 heads work on a float16 network.
        """
        if self.input_scale != 1:
            height, width = (max(1, round(s * self.input_scale)) for s in x.shape[-2:])
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        return tuple(level.to(x.dtype) for level in self.net(x))
