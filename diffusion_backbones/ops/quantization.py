"""Weights kept in eight bits and computed with in the dtype of the backbone.

torchao rounds every row of a weight, one output channel, to 255 steps of its own size, and gives it back in full for
the one layer that runs. Linear and convolutional layers of the denoiser are kept so, which is nearly all of it; biases,
norms and the image encoder stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_DTYPES = (None, "int8")
ROW_BYTES = 1
"""Bytes per row for the zero point; the scale of a row has the dtype of the weight."""


def check_weight_dtype(weight_dtype: Any, trainable: Any) -> str | None:
    """The dtype of weights by its name, or None if it is that of everything else.

    Raises:
        ImportError: torchao is not there.
        TypeError: Weights in eight bits are to be trained.
        ValueError: Another dtype.
    """
    name = "int8" if weight_dtype is torch.int8 else weight_dtype
    if not (name is None or isinstance(name, str)) or name not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype must be 'int8' or None, which is dtype, got {weight_dtype!r}")
    if name and trainable:
        raise TypeError(
            f"weight_dtype={name!r} rounds the weights, and trainable={trainable!r} needs gradients through whole "
            "ones; leave one of them out"
        )
    if name and find_spec("torchao") is None:
        raise ImportError(
            f"weight_dtype={name!r} needs torchao; install it with pip install 'diffusion-backbones[int8]'"
        )
    return name


def quantized_names(network: nn.Module, called: Collection[str]) -> frozenset[str]:
    """Which tensors of a network's ``state_dict`` can be kept in eight bits: weights of linear and convolutional layers
    whose own forward runs; other weights are read directly by their parent.

    Args:
        network: The denoiser.
        called: As :func:`diffusion_backbones.surgery.introspection.called` gives it.
    """
    layers = {path for path, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    return frozenset(f"{path}.weight" for path in layers & set(called))


def int8(weight: Tensor) -> Tensor:
    """A weight (rows, ...) in eight bits, a step for every row. It still reports its own dtype and shape."""
    return _on_meta(weight.shape, weight.dtype).clone() if weight.is_meta else _rounded(weight)


@functools.cache
def _on_meta(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Without values all weights of a shape are the same, and torchao takes 10 ms for each."""
    return _rounded(torch.empty(shape, dtype=dtype, device="meta"))


def _rounded(weight: Tensor) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    rounded: Tensor = IntxUnpackedToInt8Tensor.from_hp(weight, (1, *weight.shape[1:]), torch.int8)
    return rounded


def quantize_(network: nn.Module, some: Collection[str]) -> None:
    """Keep some parameters of a network in eight bits, in place."""
    for name in some:
        path = name.removesuffix(".weight")
        layer = network.get_submodule(path)
        layer.weight = nn.Parameter(int8(layer.get_parameter("weight").detach()), requires_grad=False)


def stored_bytes(tensor: Tensor, dtype: torch.dtype, rounded: bool) -> int:
    """Bytes that a tensor takes in a dtype, or in eight bits."""
    if not rounded:
        return tensor.numel() * dtype.itemsize
    return tensor.numel() + len(tensor) * (dtype.itemsize + ROW_BYTES)
