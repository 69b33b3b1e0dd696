"""Copies of networks that take no memory, and what is read off them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.contract import Backbone

N = TypeVar("N", bound=nn.Module)


def without_values(net: N) -> N:
    """A copy in eval mode on ``meta``."""
    return _copied(net, lambda t: torch.empty_like(t, device="meta")).eval()


def frozen_view(net: N) -> N:
    """A copy that holds the same values, in the same memory, and trains none of them."""
    return _copied(net, Tensor.detach)


def freeze_unread(backbone: Backbone, positions: Sequence[int]) -> None:
    """Train nothing that only other maps than these depend on: it would get no gradients, for which
    ``DistributedDataParallel`` waits.

    Args:
        backbone: In which nothing happens that is not trained.
        positions: In its pyramid; maybe none.
    """
    if not backbone.trainable:
        return
    if not positions:
        backbone.requires_grad_(False)
        return
    blank, step = without_values(backbone), backbone.size_divisibility
    trained = {name: p for name, p in blank.named_parameters() if p.is_floating_point()}
    with torch.enable_grad():
        for p in trained.values():
            p.requires_grad_(True)
        maps = blank(torch.empty(1, 3, 2 * step, 2 * step, device="meta", dtype=backbone.encoder_dtype))
        sums = [maps[i].sum() for i in positions if maps[i].requires_grad]
        found: Sequence[Tensor | None] = torch.autograd.grad(sums, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, found, strict=True):
        if gradient is None:
            backbone.get_parameter(name).requires_grad_(False)


def _copied(net: N, tensor: Callable[[Tensor], Tensor]) -> N:
    memo: dict[int, Any] = {id(b): tensor(b) for b in net.buffers()}
    memo |= {id(p): nn.Parameter(tensor(p.detach()), requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, memo)
