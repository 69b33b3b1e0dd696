"""How fast a device multiplies, how fast training does, and whether that is worth the device's time."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

LEAST = 60.0
"""TFLOP/s under which a training on CUDA stops."""
WARM_UP = 20.0
"""Seconds of training after which it is asked."""


def matrix_product(device: torch.device) -> float:
    """TFLOP/s of a large matrix product, in bfloat16 on CUDA and in float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    synchronize(device)
    since = time.monotonic()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * n**3 / (time.monotonic() - since) / 1e12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(function: object, *inputs: torch.Tensor) -> float:
    """Floating-point operations of a training step: those of the forward pass three times."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)  # type: ignore[operator]
    return 3.0 * counter.get_total_flops()


def judge(rate: float, peak: float, device: torch.device, slow_ok: bool) -> str:
    """What to print about ``rate`` TFLOP/s where a matrix product reaches ``peak``.

    Raises:
        SystemExit: It is CUDA and too slow.
    """
    told = f"{rate:.3g} TFLOP/s, {100 * rate / peak:.0f} % of a matrix product's {peak:.3g}"
    if device.type == "cuda" and rate < LEAST and not slow_ok:
        raise SystemExit(f"{told}: expected at least {LEAST:.0f}. Take a larger batch, or --slow-ok.")
    return told


def worked(device: torch.device) -> float:
    """Seconds that have passed on a GPU, or that this process has worked on all threads of a CPU, which others may use
    too: they make a box longer and the network in it no worse.
    """
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()
