"""What it takes to reach each activation: operations and parameters of the denoiser up to there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.spec.activations import Site


@dataclass(frozen=True)
class Reach:
    """Of one activation: 1e9 operations for one image and one draw, a multiply-add counting as two, and parameters."""

    gflops: float
    parameters: int


def reach(backbone: DiffusionBackbone, ids: Sequence[str], size: int) -> dict[str, Reach]:
    """Count on the ``meta`` device, in one run of the network, what has run when each activation comes.

    Args:
        backbone: Built with ``device="meta"``; it is left with hooks that count parameters, so it is of no other use
            afterwards.
        ids: Activation ids that it computes.
        size: Side of the square image in pixels.

    Raises:
        ValueError: The backbone is not on ``meta``.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if not next(backbone.denoiser.parameters()).is_meta:
        raise ValueError("operations are counted on the meta device: create_model(..., device='meta')")
    seen: dict[str, int] = {}
    for name, module in backbone.denoiser.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            module.register_forward_pre_hook(
                lambda m, args, name=name, own=own: seen.__setitem__(name, own), prepend=True
            )
    found: dict[str, Reach] = {}
    with torch.device("meta"):
        z = torch.empty(1, backbone.latent_channels, size // backbone.latent_stride, size // backbone.latent_stride)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:

        def note(site: Site, act: Tensor, **_: Any) -> None:
            found[site.id] = Reach(counter.get_total_flops() / 1e9, sum(seen.values()))

        backbone.visit_activations(None, ids, note, latents=z)
    return found
