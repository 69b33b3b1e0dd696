"""Autocast, and what must not be computed under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_off(device: torch.device, when: bool) -> AbstractContextManager[Any]:
    """Within the ``with`` block every operation on the device keeps the dtype of its inputs, if ``when`` says so.

    Where it does not, nothing is entered, so that an exported graph holds no region of its own.
    """
    return torch.autocast(device.type, enabled=False) if when else nullcontext()


def casts_to_float16(device: torch.device) -> bool:
    """Whether autocast is on and computes in float16 on a device."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
