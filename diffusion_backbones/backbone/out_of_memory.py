"""What to do when a call does not fit the memory of its device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.ops.describe import dtype_name, gigabytes
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.surgery.memory_budget import CHEAPER_DTYPES, capacity, free

F = TypeVar("F", bound=Callable[..., Any])


OOM_MESSAGES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",
)
"""Messages of devices and libraries that raise a plain ``RuntimeError`` when there is no memory left."""


class OutOfMemoryError(torch.OutOfMemoryError):
    """A call did not fit the memory of its device, GPU or CPU. Says what was asked for and what takes less."""


def is_oom(error: BaseException) -> bool:
    """Whether a device that has no memory left raised this."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OOM_MESSAGES)
    )


def explain_oom(part: str) -> Callable[[F], F]:
    """Decorates a function of a backbone and a batch: when the device runs out of memory in it, the error becomes an
    :class:`OutOfMemoryError`.

    A compiled graph is left as it is, and raises what the device does.

    Args:
        part: What the function runs, for the message and for what is advised. The batch is (B, C, h, w), or
            (draws, B, C, h, w) of the denoiser.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(backbone: BackboneState, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(backbone, x, *args, **kwargs)
            try:
                return function(backbone, x, *args, **kwargs)
            except OutOfMemoryError:
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_oom(error):
                    raise
                raise OutOfMemoryError(_explain(backbone, part, x, error)) from error

        return cast(F, call)

    return decorate


def check_maps(backbone: BackboneState, x: Tensor) -> None:
    """Raise :class:`OutOfMemoryError` if two of the widest maps of an image encoder are already more than the whole
    device has.

    On the CPU the system would rather end the process than say so. What fits is less than this bound: a call needs more
    than two maps.

    Args:
        x: (B, 3, H, W) padded images.
    """
    if torch.compiler.is_compiling() or (room := capacity(x.device)) is None:
        return
    image = int(2 * backbone.widest_map * x.shape[-2] * x.shape[-1] * backbone.encoder_dtype.itemsize)
    if len(x) * image > room:
        fits = room // image
        less = f"at most {_count(fits, 'image')} at a time could" if fits else "not even one could; give smaller images"
        raise OutOfMemoryError(
            f"{backbone.declaration.name}: {_images(len(x), x.shape[-2:])} need at least {gigabytes(len(x) * image)} "
            f"in the image encoder, for two of its widest maps, and {x.device} has {gigabytes(room)}; {less}"
        )


def check_draws(backbone: BackboneState, z: Tensor, ensemble: int, chunk: int | None, sites: Iterable[Site]) -> None:
    """Raise :class:`OutOfMemoryError` if the draws of an ensemble take more than is free, counting their noise, the
    noisy latents, and the largest activation that is read of those that the denoiser is run on at once.

    As in :func:`check_maps`, a call needs more.

    Args:
        z: (B, C, h, w) clean latents.
        ensemble: Number of draws.
        chunk: How many noisy latents the denoiser is run on at once; None for all.
        sites: What is read of the denoiser.
    """
    if ensemble == 1 or torch.compiler.is_compiling() or (room := free(z.device)) is None:
        return
    latents = ensemble * (z.numel() + z[0].numel()) * z.element_size()
    pixels = z.shape[-2] * z.shape[-1] * backbone.latent_stride**2
    maps = [site.channels * pixels // site.stride**2 for site in sites if site.layout in ("map", "tokens")]
    rows = min(ensemble * len(z), chunk or ensemble * len(z))
    needed = latents + rows * max(maps, default=0) * backbone.dtype.itemsize
    if needed > room:
        size = tuple(side * backbone.latent_stride for side in z.shape[-2:])
        raise OutOfMemoryError(
            f"{backbone.declaration.name}: {ensemble} noise draws of {_images(len(z), size)} need at least "
            f"{gigabytes(needed)}, and {gigabytes(room)} is free on {z.device}; give a smaller ensemble=, or a chunk= "
            "below it"
        )


def _explain(backbone: BackboneState, part: str, x: Tensor, error: BaseException) -> str:
    *draws, b, _, height, width = x.shape
    if part != "image encoder":
        height, width = height * backbone.latent_stride, width * backbone.latent_stride
    asked, rows = _images(b, (height, width)), b
    if draws and draws[0] > 1:
        asked, rows = f"{draws[0]} noise draws of {asked}", draws[0] * b
    dtype = backbone.encoder_dtype if part == "image encoder" else backbone.dtype
    less = []
    if rows > 1:
        less.append(f"chunk={rows // 2}" if part == "denoiser" else f"{_count(b // 2, 'image')} at a time")
    if part == "denoiser" and backbone.training:
        less.append("set_grad_checkpointing()")
    less += [f"dtype={dtype_name(cheaper)!r}" for cheaper in CHEAPER_DTYPES.get(dtype, ())[:1]]
    less.append(f"images of half the side, {height // 2} x {width // 2}")
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{backbone.declaration.name}: its {part} ran out of memory on {x.device} with {asked} in {dtype_name(dtype)}. "
        f"Less is needed with {', or with '.join(less)}; see docs/memory.md. ({reason})"
    )


def _images(n: int, size: Any) -> str:
    return f"{_count(n, 'image')} of {size[0]} x {size[1]} (height x width)"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' if n != 1 else ''}"
