"""Checks of tensors that a caller brings: their kind, and their values, which are read from the device once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What networks compute in; floats of one byte are only stored so."""
LARGEST = 1e12
"""Beyond it the squares that a network sums up to normalize its maps come near what float32 holds."""


def check_floating(name: str, tensor: Any, expected: str) -> None:
    """Raise ``TypeError`` unless a value is a dense tensor of floating-point numbers.

    Args:
        name: What the error calls it.
        tensor: The value.
        expected: What it must be, for the error, such as ``"(B, 4, h, w)"``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {expected}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be {expected} of floating point, which networks compute in, got {tensor.dtype}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor {expected}, got {kind}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at: neither while a graph is traced nor on ``meta``."""
    return not torch.compiler.is_compiling() and not tensor.is_meta


class ValueChecks:
    """Checks of values, made on the device. :meth:`read` waits for the device once, however many they are."""

    def __init__(self) -> None:
        self._checks: list[tuple[Tensor, str]] = []

    def add(self, holds: Tensor, error: str) -> None:
        """A check.

        Args:
            holds: () bool.
            error: The message if it does not hold.
        """
        self._checks.append((holds, error))

    def finite(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Check that a tensor has neither NaN nor infinity, also in the ``dtype`` that it is computed with."""
        if readable(tensor) and tensor.dtype in FLOATING and tensor.numel():
            dtype = dtype or tensor.dtype
            largest = min(LARGEST, *(torch.finfo(kind).max for kind in (dtype, tensor.dtype)))
            holds = tensor.detach().abs().amax().float() <= largest  # false for NaN
            what = f"what {dtype} cannot hold, or more than {LARGEST:g}"
            self.add(holds, f"{name} must be finite, and has NaN, infinity, {what}")

    def read(self) -> None:
        """Raise ``ValueError`` for the first check that does not hold."""
        if self._checks:
            together = torch.stack([holds.to(self._checks[0][0].device) for holds, _ in self._checks])
            for holds, (_, error) in zip(together.tolist(), self._checks, strict=True):
                if not holds:
                    raise ValueError(error)
