"""Tensors, dtypes and sizes in words, for errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shape(x: Any) -> str:
    """dtype and shape of a tensor, or the type of anything else."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def gigabytes(number: int) -> str:
    """Bytes as ``1.5 GB``."""
    return f"{number / 1e9:.1f} GB"
