"""The methods by which timm, and what is built on it, ask a model for features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.spec.validation import check_flag


class TimmMixin(BackboneState):
    """timm's names for what a backbone does. Nothing here computes anything itself."""

    num_classes, in_chans = 0, 3

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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the denoiser while it is trained. A compiled one is a ``ValueError``: its graph
        can no longer be cut into checkpoints; what is no truth value is a ``TypeError``.
        """
        if check_flag("enable", enable) and self.compiled:
            raise ValueError(
                f"{self.declaration.name} is compiled, and what a compiled network keeps for its gradients is fixed; "
                "create it without compile="
            )
        (self.denoiser.enable_gradient_checkpointing if enable else self.denoiser.disable_gradient_checkpointing)()  # type: ignore[operator]

    def group_matcher(self, coarse: bool = False) -> Any:
        """For timm's layer-wise learning rates: parameter name -> depth, from input to output."""
        return self._depth

    def _depth(self, name: str) -> int:
        return self.architecture.depth(name.removeprefix("denoiser.")) if name.startswith("denoiser.") else 0

    def no_weight_decay(self) -> set[str]:
        """For timm's optimisers: a learned prompt, as they treat other learned tokens."""
        return {name for name, _ in self.named_parameters() if name.startswith("conditioning.")}
