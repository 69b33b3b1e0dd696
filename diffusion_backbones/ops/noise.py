"""Forward processes: how much noise a timestep means, and where the noise comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_backbones.ops.describe import shape
from diffusion_backbones.ops.large_libraries import stock
from diffusion_backbones.ops.tensor_checks import check_floating, readable
from diffusion_backbones.spec.configs import Config
from diffusion_backbones.spec.validation import plain

CANVAS = 256
"""Side of the fixed noise canvas in latent positions (2048 pixels at stride 8); larger latents repeat it."""
FARTHEST = 2**31
"""Timesteps of every network are far below it."""
REAL = "timestep must be a real number, or one per image"
NOISE = "noise must be 'fixed', 'random', 'none' or a tensor"
Timestep = int | float | Tensor
"""What the network receives: a number, or () or (B,) of them."""


class ForwardProcess(Protocol):
    """z_t = alpha(t) z + sigma(t) noise."""

    def levels(self, timestep: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(alpha, sigma) at one timestep, or (B, 1, 1, 1) tensors at (B,) timesteps."""


@dataclass(frozen=True)
class VariancePreserving:
    """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), the marginal that DDPM, DDIM, PNDM and DPM++ state.

    Euler schedulers write the same marginal as (z + s noise) / sqrt(s² + 1) with s = sigma / alpha, so one formula
    serves every checkpoint that was trained on one of these schedules.

    Args:
        alpha_bar: The cumulative products, one per training timestep. Plain numbers: there is no buffer to lose.
    """

    alpha_bar: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Config) -> VariancePreserving:
        """Read the schedule from a scheduler's config, as diffusers computes it.

        The config is one that :func:`~diffusion_backbones.spec.schedule.check_schedule` accepts.
        """
        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        with torch.device("cpu"):  # also inside `with torch.device("meta")`
            scheduler = stock("DDPMScheduler")(**{key: config[key] for key in keys if key in config})
        return cls(tuple(scheduler.alphas_cumprod.tolist()))

    def levels(self, timestep: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """See :class:`ForwardProcess`; a fractional timestep is read at its integer part.

        Raises:
            ValueError: The timestep is outside the schedule.
        """
        if isinstance(timestep, Tensor):
            if readable(timestep):
                for end in torch.stack(timestep.aminmax()).tolist():
                    self._check(end)
            bar = torch.tensor(self.alpha_bar, device=timestep.device)[timestep.long()].view(-1, 1, 1, 1)
            return bar.sqrt(), (1 - bar).sqrt()
        self._check(timestep)
        bar_t = self.alpha_bar[int(timestep)]
        return bar_t**0.5, (1 - bar_t) ** 0.5

    def _check(self, timestep: float) -> None:
        if not 0 <= timestep < len(self.alpha_bar):
            raise ValueError(
                f"timestep must be from 0 to {len(self.alpha_bar) - 1} to have a noise level, got {timestep}; with "
                "noise='none' any is possible"
            )


@dataclass(frozen=True)
class UnknownProcess:
    """A schedule that is not known here, so that there are no noise levels; without noise a network is still read.

    Args:
        reason: What is not known, as an error says it.
    """

    reason: str

    def levels(self, timestep: float | Tensor) -> tuple[float | Tensor, float | Tensor]:  # noqa: ARG002
        """See :class:`ForwardProcess`.

        Raises:
            ValueError: Always, with the reason.
        """
        raise ValueError(self.reason)


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t / 1000, sigma = t / 1000: flow matching's straight line, without a shift for the resolution."""

    def levels(self, timestep: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """See :class:`ForwardProcess`.

        Raises:
            ValueError: The timestep is not from 0 to 1000.
        """
        if isinstance(timestep, Tensor):
            if readable(timestep):
                for end in torch.stack(timestep.aminmax()).tolist():
                    self._check(end)
            sigma = timestep.float().view(-1, 1, 1, 1) / 1000
            return 1 - sigma, sigma
        self._check(timestep)
        return 1 - timestep / 1000, timestep / 1000

    def _check(self, timestep: float) -> None:
        if not 0 <= timestep <= 1000:
            raise ValueError(
                "timestep must be from 0 to 1000 on a rectified flow, where it is 1000 times the share of noise; got "
                f"{timestep}"
            )


def canvas(seed: int, ensemble: int, channels: int, size: tuple[int, int] = (CANVAS, CANVAS)) -> Tensor:
    """The fixed noise, (ensemble, channels, *size) float32, on the default device (empty on ``meta``); see :func:`crop`
    for other sizes than the canvas's own.

    Every image, batch and size reads a crop of it, so that an image's features do not depend on its neighbors, but for
    rounding: about 1e-6 of their size in float32 and 1e-2 in bfloat16 (root mean square of the difference over that of
    the map; the tests allow three times as much).
    """
    out = torch.empty(ensemble, channels, *size, dtype=torch.float32)
    if not out.is_meta:
        for i in range(ensemble):
            generator = torch.Generator(device="cpu").manual_seed(seed + i)
            whole = torch.randn(channels, CANVAS, CANVAS, generator=generator, device="cpu", dtype=torch.float32)
            out[i] = crop(whole, *size)
    return out


def crop(noise: Tensor, height: int, width: int) -> Tensor:
    """(..., S, S) -> (..., height, width): the upper left corner, repeated where the canvas is too small."""
    rows, columns = -(-height // noise.shape[-2]), -(-width // noise.shape[-1])
    if rows > 1 or columns > 1:
        noise = noise.repeat(*[1] * (noise.ndim - 2), rows, columns)
    return noise[..., :height, :width]


def draw(
    z: Tensor, noise: Any, ensemble: int, canvas: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    """The noise of a call, (ensemble, B or 1, C, h, w), or None for none.

    Args:
        z: (B, C, h, w) latents.
        noise: ``"fixed"``, ``"random"``, ``"none"``, or a tensor (C, h, w) or (B, C, h, w).
        ensemble: Number of draws.
        canvas: (ensemble, C, h, w) of the fixed noise, where that is asked for.
        generator: For random noise.

    Raises:
        TypeError: The noise is a tensor of another kind than floating point.
        ValueError: They do not go together.
    """
    if generator is not None and not (isinstance(noise, str) and noise == "random"):
        raise ValueError("generator= is for noise='random'")
    if isinstance(noise, Tensor):
        check_floating("noise", noise, f"{tuple(z.shape[1:])}")
        if tuple(noise.shape) not in (tuple(z.shape[1:]), tuple(z.shape)) or ensemble > 1:
            raise ValueError(
                f"noise must be {tuple(z.shape[1:])} or {tuple(z.shape)} without an ensemble, got {shape(noise)} with "
                f"ensemble={ensemble}"
            )
        return noise.to(z).expand(1, *z.shape)
    if not isinstance(noise, str):
        raise ValueError(f"{NOISE}, got {noise!r}")
    if noise == "none":
        if ensemble > 1:
            raise ValueError("an ensemble averages noise draws, and noise='none' has none")
        return None
    if noise == "fixed":
        assert canvas is not None
        return canvas.to(z)[:, None]
    if noise == "random":
        return torch.randn(
            (ensemble, *z.shape), generator=generator, device=generator.device if generator else z.device
        ).to(z)
    raise ValueError(f"{NOISE}, got {noise!r}")


def mix(z: Tensor, noise: Tensor | None, timestep: Timestep, process: ForwardProcess) -> Tensor:
    """(B, C, h, w) clean latents -> (ensemble · B, C, h, w) noisy ones, draw by draw."""
    if noise is None:
        return z
    alpha, sigma = process.levels(
        timesteps(timestep, z.shape[0], z.device) if isinstance(timestep, Tensor) else timestep
    )
    return (alpha * z + sigma * noise).flatten(0, 1)


def check_timestep(timestep: Any) -> Timestep:
    """A timestep as it is given, in Python's number or as a tensor () or (B,) of int64 or float32.

    Raises:
        TypeError: It is neither a real number nor several.
        ValueError: It is not finite.
    """
    if not isinstance(timestep, (Tensor, int, float)):
        timestep = _read_timestep(timestep)
    if isinstance(timestep, Tensor):
        if timestep.dtype == torch.bool or timestep.is_complex():
            raise TypeError(f"{REAL}, got {timestep.dtype}")
        return timestep.float() if timestep.is_floating_point() else timestep.long()
    if isinstance(timestep, bool):
        raise TypeError(f"{REAL}, got {timestep!r}")
    if not abs(timestep) < FARTHEST:
        raise ValueError(f"timestep must be finite, and between -{FARTHEST} and {FARTHEST}; got {timestep}")
    number: int | float = timestep
    return number


def check_timesteps(timesteps: Any) -> tuple[Timestep, ...]:
    """Several timesteps as they are given, each as :func:`check_timestep` takes it.

    Raises:
        TypeError: Not a sequence, or one that holds something else.
        ValueError: There is none, or one is there twice.
    """
    if getattr(timesteps, "ndim", 0) == 1 and not (isinstance(timesteps, Tensor) and not readable(timesteps)):
        timesteps = timesteps.tolist()
    if isinstance(timesteps, (str, bytes)) or not (isinstance(timesteps, Sequence) or getattr(timesteps, "ndim", None)):
        raise TypeError(f"timesteps must be a sequence of timesteps such as (50, 150, 250), got {timesteps!r}")
    several = tuple(map(check_timestep, timesteps))
    numbers = [t for t in several if not isinstance(t, Tensor)]
    if not several or len(set(numbers)) < len(numbers):
        raise ValueError(f"timesteps must be one or more that differ from each other, got {timesteps!r}")
    return several


def _read_timestep(timestep: Any) -> Any:
    """A scalar of numpy, a list or an array as Python's number or as a tensor."""
    number = plain(timestep)
    if isinstance(number, (int, float)):
        return number
    try:
        several = torch.as_tensor(timestep)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{REAL}, got {timestep!r}") from None
    if several.is_floating_point() and not several.is_meta and not bool(several.isfinite().all()):
        raise ValueError(f"timestep must be finite, got {timestep!r}")
    return several


def timesteps(timestep: Timestep, b: int, device: torch.device) -> Tensor:
    """(B,) of what the network receives: integers as int64, as DDPM's schedulers give them, others as float32.

    Raises:
        ValueError: Neither one number nor one per image.
    """
    if isinstance(timestep, Tensor):
        t = timestep.to(device)
        if t.ndim > 1 or t.numel() not in (1, b):
            raise ValueError(f"timestep must be one number or {b}, one per image; got {shape(t)}")
        return t.reshape(-1).expand(b)
    return torch.full(
        (b,), timestep, device=device, dtype=torch.int64 if float(timestep).is_integer() else torch.float32
    )
