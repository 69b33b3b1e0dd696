"""Autocast, and what must not be computed under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def casts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def casts_to_float16(device: torch.device) -> bool:
    """Whether autocast is on, and computes in float16."""
    return casts(device) and torch.get_autocast_dtype(device.type) == torch.float16


def autocast_off(device: torch.device, when: bool) -> AbstractContextManager[Any]:
    """Within the ``with`` block every operation on the device keeps the dtype of its inputs, if ``when`` says so.

    Where it does not, nothing is entered, so that an exported graph holds no region of its own.
    """
    return torch.autocast(device.type, enabled=False) if when else nullcontext()
