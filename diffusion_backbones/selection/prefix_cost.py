"""The cost of the network's prefix up to each activation: operations and parameters of the denoiser up to there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.spec.activations import Site


@dataclass(frozen=True)
class PrefixCost:
    """The cost of the denoiser up to one activation.

    Args:
        gflops: 1e9 operations for one image and one draw, a multiply-add counting as two.
        parameters: Number of parameters.
    """

    gflops: float
    parameters: int


def prefix_costs(backbone: DiffusionBackbone, ids: Sequence[str], size: int) -> dict[str, PrefixCost]:
    """Count on the ``meta`` device, in one run of the network, what has run up to each activation.

    Args:
        backbone: Built with ``device="meta"``. It keeps hooks that count parameters, so it is of no use afterwards.
        ids: Activation ids that it computes.
        size: Side of the square image in pixels.

    Raises:
        ValueError: The backbone is not on ``meta``.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if backbone.device.type != "meta":
        raise ValueError("operations are counted on the meta device: create_model(..., device='meta')")
    seen: dict[str, int] = {}
    _count_parameters(backbone.denoiser, seen)
    found: dict[str, PrefixCost] = {}
    with torch.device("meta"):
        z = torch.empty(1, backbone.latent_channels, size // backbone.latent_stride, size // backbone.latent_stride)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:

        def record(site: Site, _: Tensor) -> None:
            found[site.id] = PrefixCost(counter.get_total_flops() / 1e9, sum(seen.values()))

        backbone.visit_activations(None, ids, record, latents=z)
    return found


def _count_parameters(network: nn.Module, seen: dict[str, int]) -> None:
    """Let every module note its own parameters in ``seen`` when it runs."""
    for name, module in network.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:

            def note(*_: Any, name: str = name, own: int = own) -> None:
                seen[name] = own

            module.register_forward_pre_hook(note, prepend=True)
