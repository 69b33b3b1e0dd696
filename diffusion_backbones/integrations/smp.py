"""A backbone as an encoder of segmentation_models_pytorch (smp), under every decoder but DPT.

::

    model = smp.FPN(register(backbone), encoder_weights=None, classes=21)

smp expects levels at strides 2, 4, 8, 16 and 32; those that the pyramid lacks are resampled without parameters. DPT
takes no registered encoder and needs none: ``smp.DPT("tu-sd15_gdf", out_strides=(4, 8, 16, 32),
decoder_readout="ignore")`` goes through timm.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.integrations import missing
from diffusion_backbones.ops import pyramid
from diffusion_backbones.spec.levels import nearest

try:
    from segmentation_models_pytorch.encoders import encoders  # type: ignore[import-untyped]
except ImportError as error:
    raise missing("segmentation_models_pytorch", "smp", error) from error

__all__ = ["Encoder", "register"]

STRIDES = (2, 4, 8, 16, 32)


def register(backbone: Backbone, name: str | None = None) -> str:
    """Register a backbone in smp under a name.

    Args:
        backbone: A backbone with its weights. It is not copied: all models that are built on the name share it.
        name: The name; by default the backbone's with the prefix ``diffusion-``. Registering it again replaces the
            backbone.

    Returns:
        The name, for the ``encoder_name`` of any smp model but DPT. Pass ``encoder_weights=None`` with it, since the
        backbone has its weights.

    Raises:
        TypeError: ``backbone`` is not a backbone.
        ValueError: smp would look for the name in timm.
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f"register takes a backbone from create_model, got {backbone!r}")
    name = name or f"diffusion-{backbone.declaration.name}"
    if name.startswith(("tu-", "timm-")):
        raise ValueError(
            f"smp looks for names that begin with {name.partition('-')[0]}- in timm, got {name!r}; choose another"
        )
    encoders[name] = {"encoder": partial(Encoder, backbone), "params": {}, "pretrained_settings": {}}
    return name


class Encoder(nn.Module):
    """A backbone with the interface of an smp encoder.

    Args:
        backbone: The backbone, which is shared.
        depth: Number of strides, from 2 to 5.
        output_stride: Stride of the last map, at most.

    Attributes:
        out_channels: Channels of every map that :meth:`forward` returns: 3 for the image, 0 at stride 2 unless the
            pyramid has that stride, as in smp's own transformer encoders, and elsewhere those of the level with the
            nearest stride.
        output_stride: Stride of the last map.

    Raises:
        ValueError: ``depth`` is out of range.
    """

    def __init__(self, backbone: Backbone, depth: int = 5, output_stride: int = 32):
        super().__init__()
        if not 2 <= depth <= len(STRIDES):
            raise ValueError(
                f"encoder_depth counts the strides {STRIDES} and must be from 2 to {len(STRIDES)}, got {depth}"
            )
        self.backbone, self.depth = backbone, depth
        self.native, channels = backbone.feature_info.reduction(), backbone.feature_info.channels()
        self.sources = [
            nearest(stride, self.native) if stride > 2 or stride in self.native else None for stride in STRIDES[:depth]
        ]
        self.out_channels = [3, *(0 if source is None else channels[source] for source in self.sources)]
        self.make_dilated(output_stride)

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:  # noqa: ARG002  # smp's interface
        """Raise ``ValueError`` unless ``in_channels`` is 3."""
        if in_channels != 3:
            raise ValueError(
                f"the image encoder takes RGB, so in_channels must be 3, got {in_channels}; bring the image to three "
                "channels first"
            )

    def make_dilated(self, output_stride: int) -> None:
        """Resample coarser maps to ``output_stride``, since there is nothing to dilate."""
        self.strides = [min(stride, output_stride) for stride in STRIDES[: self.depth]]
        self.output_stride = self.strides[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images -> ``x`` itself and the maps at strides 2, 4, ...

        Args:
            x: (B, 3, H, W) in [-1, 1].

        Returns:
            ``x``, then (B, C, ceil(H / s), ceil(W / s)) for every stride s, in the dtype of ``x``.
        """
        size, maps, out = (x.shape[-2], x.shape[-1]), self.backbone(x), [x]
        for source, stride in zip(self.sources, self.strides, strict=True):
            if source is None:
                out.append(x.new_empty(len(x), 0, *(-(-s // stride) for s in size)))
            else:
                out.append(pyramid.resample(maps[source], self.native[source], stride, size).to(x.dtype))
        return out
