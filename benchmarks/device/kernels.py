"""Which kernels a call spends its time in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from diffusion_backbones.evaluation import benchmark

CALLS, COUNT = 3, 10


def dearest(call: Callable[[], Any], device: str) -> tuple[str, float]:
    """The kernels of a call that take most time, and the share of the call's time in which any kernel ran.

    Kernels that run at once count each. On the CPU they are PyTorch's operators.
    """
    cuda = torch.device(device).type == "cuda"
    for _ in range(2):
        seconds = benchmark.once(call, device)
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    began = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(CALLS):
            benchmark.once(call, device)
    profiled = (time.perf_counter() - began) / CALLS
    events = [e for e in profiler.key_averages() if (e.device_type == DeviceType.CUDA) == cuda]
    spent = {e: (e.self_device_time_total if cuda else e.self_cpu_time_total) / CALLS / 1e6 for e in events}
    total = sum(spent.values())
    lines = [f"{1000 * seconds:.2f} ms a call, {1000 * profiled:.2f} profiled; {1000 * total:.2f} ms in kernels"]
    for event in sorted(spent, key=spent.__getitem__, reverse=True)[:COUNT]:
        ms, count = 1000 * spent[event], event.count / CALLS
        lines.append(f"{ms:9.3f} ms {spent[event] / total:6.1%} {count:6.0f} calls  {event.key[:160]}")
    return "\n".join(lines), total / seconds
