"""What to do when a call does not fit the memory of its device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from diffusion_backbones.surgery.memory_budget import SMALLER, _gb, _name, capacity

if TYPE_CHECKING:
    from diffusion_backbones.backbone.timm_mixin import TimmInterface


M = TypeVar("M", bound=Callable[..., Any])


SIGNS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",
)
"""What devices and libraries say that raise a plain ``RuntimeError`` when there is no memory left."""


class OutOfMemory(torch.OutOfMemoryError):
    """A call did not fit the memory of its device, be it a GPU or the CPU. Says what was asked for and what takes less."""


def ran_out(error: BaseException) -> bool:
    """Whether a device that has no memory left raised this."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def explained(part: str) -> Callable[[M], M]:
    """Decorates a method of a backbone: when the device runs out of memory in it, the error becomes an
    :class:`OutOfMemory`.

    A compiled graph is left as it is, and raises what the device does.

    Args:
        part: What the method runs, for the message and for what is advised. The method's first argument is the batch:
            (B, C, h, w), or (draws, B, C, h, w) of the denoiser.
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
    """Raise :class:`OutOfMemory` if two of the widest maps of an image encoder are already more than the whole device
    has.

    On the CPU the system would rather end the process than say so. What fits is less than this bound: a call needs more
    than two maps.

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
            f"{name}: {_images(len(x), x.shape[-2:])} need at least {_gb(len(x) * image)} in the image encoder, for "
            f"two of its widest maps, and {x.device} "
            f"has {_gb(room)}; {less}"
        )


def _explain(backbone: TimmInterface, part: str, x: Tensor, error: BaseException) -> str:
    *draws, b, _, height, width = x.shape
    if part != "image encoder":
        height, width = height * backbone.latent_stride, width * backbone.latent_stride
    asked, rows = _images(b, (height, width)), b
    if draws and draws[0] > 1:
        asked, rows = f"{draws[0]} noise draws of {asked}", draws[0] * b
    network = backbone.encoder if part == "image encoder" else backbone.denoiser
    dtype = next(
        (p.dtype for p in network.parameters() if p.dtype.itemsize > 1), x.dtype
    )  # weights of one byte are only stored so
    less = []
    if rows > 1:
        less.append(f"chunk={rows // 2}" if part == "denoiser" else f"{_count(b // 2, 'image')} at a time")
    if part == "denoiser" and backbone.training:
        less.append("set_grad_checkpointing()")
    less += [f"dtype={_name(smaller)!r}" for smaller in SMALLER.get(dtype, ())[:1]]
    less.append(f"images of half the side, {height // 2} x {width // 2}")
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{backbone.declaration.name}: its {part} ran out of memory on {x.device} with {asked} in {_name(dtype)}. "
        "Less is needed with "
        f"{', or with '.join(less)}; see docs/memory.md. ({reason})"
    )


def _images(n: int, size: Any) -> str:
    return f"{_count(n, 'image')} of {size[0]} x {size[1]} (height x width)"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' if n != 1 else ''}"
