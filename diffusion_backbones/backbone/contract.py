"""What everything that stands on a backbone asks of it, whether it reads one network or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.spec.input_format import InputFormat
from diffusion_backbones.spec.levels import OutMap


class Backbone(nn.Module):
    """An image in, a feature pyramid out, with the methods by which timm, and what is built on it, asks for features.

    Attributes:
        declaration: What it is: at least ``name``, ``input_size``, and the ``digest`` of what is read.
        input_format: How the images that it takes were normalized.
        provenance: Where its weights came from.
        trainable: What of it is trained; nothing if False.
        compiled: Whether, and how, it is compiled.
    """

    declaration: Any
    input_format: InputFormat
    provenance: dict[str, str]
    trainable: bool | str
    compiled: bool | str = False
    num_classes, in_chans = 0, 3

    @property
    def out_maps(self) -> list[OutMap]:
        """Channels, stride and native level of every map that a call returns."""
        raise NotImplementedError

    @property
    def module_names(self) -> list[str]:
        """The modules that each map is read from, joined by ``+``."""
        raise NotImplementedError

    @property
    def activations(self) -> list[tuple[str, ...]]:
        """The activations that each map is made of, by name."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its maps."""
        raise NotImplementedError

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What its image encoder computes in."""
        return self.dtype

    @property
    def widest_map(self) -> float:
        """Values of the widest map that it computes, for every pixel."""
        raise NotImplementedError

    @property
    def configs(self) -> Mapping[str, Any]:
        """Everything that describes its networks, JSON-able."""
        raise NotImplementedError

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What ``timm.data.resolve_model_data_config`` reads."""
        raise NotImplementedError

    @property
    def size_divisibility(self) -> int:
        """What images are padded to a multiple of, in pixels. Any size is accepted."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory while it is trained."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """How it was built, where that changes the last digits of its features at least."""
        return {}

    @property
    def num_features(self) -> int:
        """Channels of the coarsest map."""
        return self.out_maps[-1].channels

    @property
    def feature_info(self) -> Any:
        """timm's ``FeatureInfo`` of a call's maps: ``channels()``, ``reduction()``, ``module_name()``."""
        from timm.models import FeatureInfo

        infos = [
            {"num_chs": m.channels, "reduction": m.stride, "module": name, "index": i}
            for i, (m, name) in enumerate(zip(self.out_maps, self.module_names, strict=True))
        ]
        return FeatureInfo(infos, tuple(range(len(infos))))

    def extra_repr(self) -> str:
        """Name, channels and strides, for ``repr``."""
        return f"{self.declaration.name}: {', '.join(f'{m.channels}@{m.stride}' for m in self.out_maps)}"

    def forward_features(self, x: Tensor, **call: Any) -> Tensor:
        """The coarsest map, (B, num_features, h, w)."""
        coarsest: Tensor = self.forward(x, 1, **call)[0]
        return coarsest

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """There is no head.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.declaration.name} has no classifier head; use the pyramid that forward() returns")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **call: Any,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's way of asking for levels.

        Args:
            x: As in :meth:`forward`.
            indices: As in :meth:`forward`.
            norm: Must be False: activations have no final norm.
            stop_early: Accepted; nothing ever runs after the last activation.
            output_fmt: ``NCHW``, or ``NLC`` for (B, h·w, C).
            intermediates_only: Return the list alone.

        Returns:
            The list of maps, or (coarsest map, list of maps).
        """
        if norm:
            raise ValueError("norm=True asks for a final norm, and activations have none")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        maps = self.forward(x, indices, **call)
        out = [m.flatten(2).transpose(1, 2) for m in maps] if output_fmt == "NLC" else maps
        return out if intermediates_only else (maps[-1], out)

    def get_classifier(self) -> nn.Module:
        """An identity: there is no classifier."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int = 0, global_pool: str | None = None) -> None:
        """Accepted for zero classes, since there is no classifier; anything else is a ``ValueError``."""
        if num_classes:
            raise ValueError(
                f"{self.declaration.name} has no classifier to reset to {num_classes} classes; put a head on its "
                "pyramid"
            )
