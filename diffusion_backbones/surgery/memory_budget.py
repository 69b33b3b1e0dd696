"""The memory budget of weights: whether they fit their device, before any is read, and what would take less."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from diffusion_backbones.ops import quantization
from diffusion_backbones.ops.describe import dtype_name, gigabytes
from diffusion_backbones.ops.free_memory import free_memory

CHEAPER_DTYPES = {torch.float32: (torch.bfloat16, torch.float16), torch.float64: (torch.float32, torch.bfloat16)}
"""What else one may ask for."""


def check_budget(
    parts: list[tuple[nn.Module, torch.dtype]], device: torch.device, name: str, rounded: Collection[str] = ()
) -> None:
    """Raise ``MemoryError`` if networks on ``meta`` would not fit on a device, in their target dtypes.

    On a GPU it is the free memory that counts; on the CPU, where weights may stay in their files, all that the machine
    has. What the activations of a call need comes on top and is not known here.
    """
    room = available(device)
    needed = weights(parts, rounded)
    if room is None or needed <= room:
        return
    asked = parts[0][1]
    settings = {
        f"dtype={dtype_name(dtype)!r}": weights([(network, dtype) for network, _ in parts], rounded)
        for dtype in CHEAPER_DTYPES.get(asked, ())
    }
    if not rounded:
        denoiser = parts[0][0]
        settings["weight_dtype='int8'"] = weights(
            parts, quantization.quantized_names(denoiser, dict(denoiser.named_modules()))
        )
    fitting = [f"{setting} takes {gigabytes(size)}, which fits" for setting, size in settings.items() if size <= room]
    least = (
        f"{gigabytes(min([needed, *settings.values()]))} is the least that one setting gives; docs/memory.md says how "
        "to quantise and to offload"
    )
    raise MemoryError(
        f"{name} needs {gigabytes(needed)} for its weights in {dtype_name(asked)}, and {device} has {gigabytes(room)}; "
        f"{fitting[0] if fitting else least}"
    )


def weights(parts: list[tuple[nn.Module, torch.dtype]], rounded: Collection[str] = ()) -> int:
    """Bytes of the weights of a denoiser, and of an image encoder, in their dtypes; ``rounded`` names those of the
    denoiser that have eight bits.
    """
    return sum(
        quantization.stored_bytes(tensor, dtype, i == 0 and name in rounded)
        for i, (network, dtype) in enumerate(parts)
        for name, tensor in network.state_dict().items()
    )


def available(device: torch.device) -> int | None:
    """Bytes that weights may take on a device; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by PyTorch, which gives it out again
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    return None


def check_canvas(size: int, ensemble: int, device: torch.device, name: str) -> None:
    """Raise ``MemoryError`` if the fixed noise of an ensemble, ``size`` bytes, is more than is free on a device."""
    room = free(device)
    if room is not None and size > room:
        raise MemoryError(
            f"{name} with ensemble={ensemble} keeps {gigabytes(size)} of fixed noise, and {gigabytes(room)} is free on "
            f"{device}; give a smaller ensemble="
        )


# While it runs.


def free(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None if unknown."""
    return free_memory() if device.type == "cpu" else available(device)


def capacity(device: torch.device) -> int | None:
    """Bytes that a device has in all; None if unknown."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else available(device)
