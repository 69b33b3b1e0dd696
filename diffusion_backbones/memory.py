"""Whether weights fit where they are asked to go, before any of them is read; and what would take less, when a call does not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from diffusion_backbones import quantised

if TYPE_CHECKING:
    from diffusion_backbones.interface import TimmInterface

M = TypeVar("M", bound=Callable[..., Any])

SMALLER = {torch.float32: (torch.bfloat16, torch.float16), torch.float64: (torch.float32, torch.bfloat16)}
"""What else one may ask for."""


def check(parts: list[tuple[nn.Module, torch.dtype]], device: torch.device, name: str, rounded: Collection[str] = ()) -> None:
    """Raise ``MemoryError`` if networks on ``meta`` would not fit on a device, in the dtypes that they are to have.

    On a GPU it is the free memory that counts; on the CPU, where weights may stay in their files, all that the machine has.
    What the activations of a call need comes on top and is not known here.
    """
    room = available(device)
    needed = weights(parts, rounded)
    if room is None or needed <= room:
        return
    asked = parts[0][1]
    settings = {f"dtype={_name(dtype)!r}": weights([(network, dtype) for network, _ in parts], rounded) for dtype in SMALLER.get(asked, ())}
    if not rounded:
        denoiser = parts[0][0]
        settings["weight_dtype='int8'"] = weights(parts, quantised.names(denoiser, dict(denoiser.named_modules())))
    fitting = [f"{setting} takes {_gb(size)}, which fits" for setting, size in settings.items() if size <= room]
    least = f"{_gb(min([needed, *settings.values()]))} is the least that one setting gives; docs/memory.md says how to quantise and to offload"
    raise MemoryError(f"{name} needs {_gb(needed)} for its weights in {_name(asked)}, and {device} has {_gb(room)}; {fitting[0] if fitting else least}")


def weights(parts: list[tuple[nn.Module, torch.dtype]], rounded: Collection[str] = ()) -> int:
    """Bytes of the weights of a denoiser, and of an image encoder, in their dtypes; ``rounded`` names those of the denoiser that have eight bits."""
    return sum(
        quantised.stored(tensor, dtype, i == 0 and name in rounded) for i, (network, dtype) in enumerate(parts) for name, tensor in network.state_dict().items()
    )


def available(device: torch.device) -> int | None:
    """Bytes that weights may take on a device; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)           # by PyTorch, which gives it out again
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    return None


# While it runs.

SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a memory object")
"""What devices and libraries say that raise a plain ``RuntimeError`` when there is no memory left."""


class OutOfMemory(torch.OutOfMemoryError):
    """A call did not fit the memory of its device, be it a GPU or the CPU. Says what was asked for and what takes less."""


def ran_out(error: BaseException) -> bool:
    """Whether a device that has no memory left raised this."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def explained(part: str) -> Callable[[M], M]:
    """Decorates a method of a backbone: when the device runs out of memory in it, the error becomes an :class:`OutOfMemory`.

    A compiled graph is left as it is, and raises what the device does.

    Args:
        part: What the method runs, for the message and for what is advised. The method's first argument is the batch: (B, C, h, w), or
            (draws, B, C, h, w) of the denoiser.
    """

    def decorate(method: M) -> M:
        @functools.wraps(method)
        def call(self: TimmInterface, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(self, x, *args, **kwargs)
            try:
                return method(self, x, *args, **kwargs)
            except OutOfMemory:
                raise
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                raise OutOfMemory(_explain(self, part, x, error)) from error

        return cast(M, call)

    return decorate


def check_maps(network: nn.Module, x: Tensor, values: float, name: str) -> None:
    """Raise :class:`OutOfMemory` if two of the widest maps of an image encoder are already more than the whole device has.

    On the CPU the system would rather end the process than say so. What fits is less than this bound: a call needs more than two maps.

    Args:
        network: Gives dtype and device.
        x: (B, 3, H, W) padded images.
        values: Of the widest map, for every pixel.
        name: Of the backbone.
    """
    if torch.compiler.is_compiling() or (room := capacity(x.device)) is None:
        return
    image = int(2 * values * x.shape[-2] * x.shape[-1] * next(network.parameters(), x).dtype.itemsize)
    if len(x) * image > room:
        fits = room // image
        less = f"at most {_count(fits, 'image')} at a time could" if fits else "not even one could; give smaller images"
        raise OutOfMemory(
            f"{name}: {_images(len(x), x.shape[-2:])} need at least {_gb(len(x) * image)} in the image encoder, for two of its widest maps, and {x.device} "
            f"has {_gb(room)}; {less}"
        )


def capacity(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where nobody says."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else available(device)


def _explain(backbone: TimmInterface, part: str, x: Tensor, error: BaseException) -> str:
    *draws, b, _, height, width = x.shape
    if part != "image encoder":
        height, width = height * backbone.latent_stride, width * backbone.latent_stride
    asked, rows = _images(b, (height, width)), b
    if draws and draws[0] > 1:
        asked, rows = f"{draws[0]} noise draws of {asked}", draws[0] * b
    network = backbone.encoder if part == "image encoder" else backbone.denoiser
    dtype = next((p.dtype for p in network.parameters() if p.dtype.itemsize > 1), x.dtype)          # weights of one byte are only stored so
    less = []
    if rows > 1:
        less.append(f"chunk={rows // 2}" if part == "denoiser" else f"{_count(b // 2, 'image')} at a time")
    if part == "denoiser" and backbone.training:
        less.append("set_grad_checkpointing()")
    less += [f"dtype={_name(smaller)!r}" for smaller in SMALLER.get(dtype, ())[:1]]
    less.append(f"images of half the side, {height // 2} x {width // 2}")
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{backbone.declaration.name}: its {part} ran out of memory on {x.device} with {asked} in {_name(dtype)}. Less is needed with "
        f"{', or with '.join(less)}; see docs/memory.md. ({reason})"
    )


def _images(n: int, size: Any) -> str:
    return f"{_count(n, 'image')} of {size[0]} x {size[1]} (height x width)"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' if n != 1 else ''}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
