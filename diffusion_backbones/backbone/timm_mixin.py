"""The methods by which timm, and what is built on it, train a denoiser."""

from __future__ import annotations

from typing import Any

from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.spec.validation import check_flag


class TimmMixin(BackboneState):
    """timm's names for what a backbone does. Nothing here computes anything itself."""

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
