"""Tensors, dtypes and sizes in words, for errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def shape(x: Any) -> str:
    """dtype and shape of a tensor, or the type of anything else."""
    from torch import Tensor  # heavy, and sizes of files need none

    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def gigabytes(number: int) -> str:
    """Bytes as ``1.5 GB``."""
    return f"{number / 1e9:.1f} GB"
