"""What one call says: parsed once, checked, and with the recipe's settings for what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.families.base import EMBEDDINGS
from diffusion_backbones.ops.describe import shape
from diffusion_backbones.ops.noise import Timestep, check_timestep, check_timesteps
from diffusion_backbones.ops.pixel_values import check_range
from diffusion_backbones.ops.tensor_checks import FLOATING, LARGEST, check_floating, readable
from diffusion_backbones.spec.input_format import InputFormat
from diffusion_backbones.spec.recipe import Combination, Recipe
from diffusion_backbones.spec.validation import as_integer, check_count, closest

FOLDED = ("prompt", "labels", *EMBEDDINGS, "timestep", "timesteps")
"""What is constant in a folded backbone."""
KEYWORDS = (*FOLDED, "noise", "generator", "ensemble", "chunk", "latents")


@dataclass(frozen=True)
class Call:
    """The settings of one call.

    Attributes:
        noise: ``"fixed"``, ``"random"``, ``"none"``, ``"inversion"``, or a tensor (C, h, w) or (B, C, h, w).
        timesteps: What the network receives, pass by pass, each a number or one per image.
        combine: How the activations of several timesteps become one.
        ensemble: Number of noise draws.
        chunk: How many noisy latents the denoiser is run on at once; None for all.
        generator: For random noise.
        latents: (B, C, h, w) clean latents in place of the image.
        prompt: A string, or one per image; None for the recipe's.
        labels: A string, or one per image, for the place that a prompt keeps for it; None for none.
        embeddings: Tensors in place of the recipe's embedded prompt, by name.
        beside: Tensors (1, ...) that are there beside what conditions the network, by name.
    """

    noise: Any
    timesteps: tuple[Timestep, ...]
    combine: Combination
    ensemble: int
    chunk: int | None
    generator: torch.Generator | None = None
    latents: Any = None
    prompt: str | Sequence[str] | None = None
    labels: str | Sequence[str] | None = None
    embeddings: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any], recipe: Recipe, chunk: int | None, name: str, folded: bool) -> Call:
        """The keywords of a call; those that are None count as not given, as in timm.

        Args:
            given: Keyword -> value.
            recipe: Says what is not given.
            chunk: The backbone's default.
            name: Of the backbone, for errors.
            folded: Whether the backbone has no weights for another prompt or timestep.

        Raises:
            TypeError: An unknown keyword; the closest is named. One that a folded backbone has no weights for. Both a
                prompt and its embeddings, or both one timestep and several. A timestep or generator of another type.
            ValueError: An ensemble or chunk of less than one; a timestep that is not finite; several that cannot be,
                or another number of them than the recipe concatenates.
        """
        given = {key: value for key, value in given.items() if value is not None}
        _check_keywords(given, name, folded)
        noise = given.get("noise", recipe.noise)
        _check_inversion(noise, given, recipe, name)
        draws = recipe.ensemble if isinstance(noise, str) and noise != "none" else 1
        return cls(
            noise=noise,
            timesteps=_timesteps(given, recipe, name),
            combine=recipe.combine,
            ensemble=check_count("ensemble", given.get("ensemble", draws)),
            chunk=check_count("chunk", given["chunk"]) if "chunk" in given else chunk,
            generator=given.get("generator"),
            latents=given.get("latents"),
            prompt=given.get("prompt"),
            labels=given.get("labels"),
            embeddings={key: given[key] for key in EMBEDDINGS if key in given},
        )


def _check_keywords(given: Mapping[str, Any], name: str, folded: bool) -> None:
    for key in given:
        if key not in KEYWORDS:
            known = ", ".join(KEYWORDS)
            raise TypeError(f"a call of {name} takes no {key!r}.{closest(key, KEYWORDS)} It takes: {known}.")
    if fixed := [key for key in given if key in FOLDED and folded]:
        raise TypeError(
            f"{name} was built with fold=True, which keeps no weights for another prompt or timestep, so a call cannot "
            f"change {', '.join(fixed)}; build it without fold=True, or with the prompt= and timestep= that it is to "
            "have"
        )
    if "generator" in given and not isinstance(given["generator"], torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(given['generator']).__name__}")
    text = next((key for key in ("prompt", "labels") if key in given), None)
    if text and (embeddings := [key for key in EMBEDDINGS if key in given]):
        raise TypeError(f"give either {text}= or {', '.join(embeddings)}, not both")


def _timesteps(given: Mapping[str, Any], recipe: Recipe, name: str) -> tuple[Timestep, ...]:
    if "timestep" in given and "timesteps" in given:
        raise TypeError("give either timestep= or timesteps=, not both")
    if "timesteps" in given:
        several = check_timesteps(given["timesteps"])
    else:
        several = (check_timestep(given["timestep"]),) if "timestep" in given else recipe.all_timesteps
    if recipe.combine == "concatenate" and len(several) != (n := len(recipe.all_timesteps)):
        raise ValueError(
            f"{name} concatenates the channels of {n} timesteps, so a call gives as many in timesteps=, got "
            f"{len(several)}; for another number build it with timesteps="
        )
    return several


def _check_inversion(noise: Any, given: Mapping[str, Any], recipe: Recipe, name: str) -> None:
    """Check that what a call says of noise goes with inversion, where the recipe or the call has it.

    Raises:
        ValueError: The network is cut, or the noise is given beside the inversion.
    """
    inverts, inverting = isinstance(noise, str) and noise == "inversion", recipe.noise == "inversion"
    if inverts and not inverting:
        raise ValueError(
            f"noise='inversion' runs the whole network, and {name} is cut behind its last activation; build it with "
            "noise='inversion'"
        )
    if inverting and isinstance(noise, Tensor):
        raise ValueError(
            f"{name} finds its noise by inversion, so none can be given; build it with another noise=, or give "
            "noise='fixed', 'random' or 'none'"
        )
    if inverts and (several := [key for key in ("ensemble", "generator") if given.get(key, 1) != 1]):
        raise ValueError(f"{several[0]}= is for noise that is drawn, and noise='inversion' draws none")


def check_image(x: Any, input_format: InputFormat, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``x`` is (B, 3, H, W), floating point, finite, also in the ``dtype``
    that it is computed with, and not empty; warn if it is out of range.

    Integers are taken where pixels are 0 to 255.
    """
    low, high = input_format.range()
    expected = f"expected (B, 3, H, W) floating point in [{low:.4g}, {high:.4g}]"
    if not isinstance(x, Tensor):
        if isinstance(x, (list, tuple)):
            advice = (
                "a batch is one tensor: stack images of one size, and pass those of several sizes one by one, or "
                "resized or padded to one"
            )
        else:
            advice = "turn a PIL image into a tensor with timm's create_transform or torchvision"
        raise TypeError(f"{expected}, got {type(x).__name__}; {advice}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{expected}, got a tensor that is {'nested' if x.is_nested else x.layout}; give a dense one")
    if x.ndim != 4 or x.shape[1] != 3:
        hints = {3: "; add the batch axis with x[None]", 4: "; repeat a grey image with x.repeat(1, 3, 1, 1)"}
        hint = hints[x.ndim] if x.ndim in hints and x.shape[-3] in (1, 3) else ""
        raise ValueError(f"{expected}, got {shape(x)}{hint}")
    pixels = x.dtype == torch.uint8 and (low, high) == (0, 255)
    if not pixels and x.dtype not in FLOATING:
        hint = "; for uint8 images use x / 127.5 - 1, or create_model(..., input_format='uint8')"
        raise TypeError(f"{expected}, got {x.dtype}{hint if x.dtype == torch.uint8 else ''}")
    if 0 in x.shape:
        raise ValueError(f"{expected}, got an empty batch {shape(x)}")
    if not readable(x):
        return
    smallest, largest = torch.stack(x.aminmax()).tolist()  # waits for the device once; NaN if there is one
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"{expected}, got NaN or infinite values")
    if max(-smallest, largest) > min(LARGEST, torch.finfo(dtype).max):
        raise ValueError(f"{expected}, got values from {smallest:.3g} to {largest:.3g}, too large for {dtype}")
    check_range(smallest, largest, input_format, x.is_floating_point())


def check_latents(
    z: Any, size: tuple[int, int] | None, channels: int, stride: int, divisibility: int
) -> tuple[int, int]:
    """The size in pixels of the image that latents belong to, before it was padded.

    Args:
        z: (B, channels, h, w), h and w multiples of divisibility / stride.
        size: What the caller says; None means that nothing was padded.

    Raises:
        TypeError: ``z`` is not floating point.
        ValueError: ``z`` has another shape, or ``size`` cannot be.
    """
    step = divisibility // stride
    check_floating("latents", z, f"(B, {channels}, h, w)")
    fits = z.ndim == 4 and z.shape[1] == channels and 0 not in z.shape
    if not fits or z.shape[-2] % step or z.shape[-1] % step:
        raise ValueError(
            f"latents must be (B, {channels}, h, w) with h and w multiples of {step}, as encode() gives them; got "
            f"{shape(z)}"
        )
    full = (z.shape[-2] * stride, z.shape[-1] * stride)
    if size is None:
        return full
    pair = isinstance(size, Sequence) and len(size) == 2 and None not in map(as_integer, size)
    if not pair:
        raise ValueError(f"size must be height and width in pixels, two integers, got {size!r}")
    if any(not f - divisibility < s <= f for s, f in zip(size, full, strict=True)):
        raise ValueError(
            f"size={tuple(size)} is not the size of an image whose latents are {tuple(z.shape[-2:])}, that is {full} "
            "pixels with padding"
        )
    return int(size[0]), int(size[1])


def check_prompts(prompt: Any, b: int) -> list[str]:
    """One prompt, or one per image.

    Raises:
        TypeError: Neither a string nor a list of strings.
        ValueError: Another number than 1 or ``b``.
    """
    some = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(some, (list, tuple)) or not all(isinstance(p, str) for p in some):
        raise TypeError(f"prompt must be a string or a list of strings, got {prompt!r}")
    if len(some) not in (1, b):
        raise ValueError(f"prompt must be one string or {b}, one per image; got {len(some)}")
    return list(some)
