"""Whether weights fit where they are asked to go, before any of them is read."""

from __future__ import annotations

import torch
from torch import nn

SMALLER = {torch.float32: (torch.bfloat16, torch.float16), torch.float64: (torch.float32, torch.bfloat16)}
"""What else one may ask for."""


def check(parts: list[tuple[nn.Module, torch.dtype]], device: torch.device, name: str) -> None:
    """Raise ``MemoryError`` if networks on ``meta`` would not fit on a device, in the dtypes that they are to have.

    On a GPU it is the free memory that counts; on the CPU, where weights may stay in their files, all that the machine has.
    What the activations of a call need comes on top and is not known here.
    """
    room = available(device)
    needed = sum(_bytes(network, dtype) for network, dtype in parts)
    if room is None or needed <= room:
        return
    asked = parts[0][1]
    sizes = {dtype: sum(_bytes(network, dtype) for network, _ in parts) for dtype in SMALLER.get(asked, ())}
    fitting = [f"dtype={_name(dtype)!r} takes {_gb(size)}, which fits" for dtype, size in sizes.items() if size <= room]
    least = f"{_gb(min([needed, *sizes.values()]))} is the least that a dtype gives; docs/memory.md says how to quantise and to offload"
    raise MemoryError(f"{name} needs {_gb(needed)} for its weights in {_name(asked)}, and {device} has {_gb(room)}; {fitting[0] if fitting else least}")


def available(device: torch.device) -> int | None:
    """Bytes that weights may take on a device; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)           # by PyTorch, which gives it out again
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    return None


def _bytes(network: nn.Module, dtype: torch.dtype) -> int:
    numbers: int = sum(tensor.numel() for tensor in network.state_dict().values())
    return numbers * dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
