"""Whether what a call is given lies where the backbone is."""

from __future__ import annotations

from torch import Tensor, nn

MOVED = ("_hf_hook", "_diffusers_hook")
"""Attributes of modules whose weights accelerate or diffusers brings to the device of the call."""
SHARDED = ("device_mesh", "ds_id")
"""Attributes of weights that FSDP or DeepSpeed keeps elsewhere between calls."""


def check_device(what: str, x: Tensor, module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` if a tensor is on another device than the weights that it meets.

    Args:
        what: What the error calls the tensor.
        x: The tensor.
        module: The network that takes it; one without weights takes any.
        name: Of the backbone.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.device == x.device or any(hasattr(weight, mark) for mark in SHARDED):
        return
    if any(hasattr(part, mark) for part in module.modules() for mark in MOVED):
        return
    raise ValueError(f"{what} are on {x.device} and {name} is on {weight.device}; bring them there with .to()")
