"""Tensors in words, for errors."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def shape(x: Any) -> str:
    """dtype and shape, for errors."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
