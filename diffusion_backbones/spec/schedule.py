"""Noise schedules as schedulers' configs state them: which are read, and their levels in plain floats. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from diffusion_backbones.spec.configs import Config, is_flow

VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "RePaintScheduler",
)
"""Classes whose marginal is sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise, with alpha_bar of ``beta_*`` keys."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""Classes whose marginal is (1 - t / 1000) z + t / 1000 noise."""
FLOW_STEPS = 1000
FILE = "scheduler/scheduler_config.json"


def check_schedule(scheduler: Config) -> None:
    """Check that a scheduler's config states a schedule that is read here.

    Raises:
        ValueError: It is of another class, or a key is missing or has a value that cannot be; file and key are named.
    """
    kind = scheduler.get("_class_name")
    if kind not in (*VARIANCE_PRESERVING, *FLOWS):
        known = ", ".join(name.removesuffix("Scheduler") for name in (*VARIANCE_PRESERVING, *FLOWS))
        raise ValueError(
            f"{FILE} has _class_name {kind!r}, whose noise levels are not known here; known are those of {known} "
            "(Scheduler). Give noise='none', with which the network takes latents and timestep as they are, or another "
            "checkpoint."
        )
    if scheduler.get("timestep_type", "discrete") != "discrete":
        raise _wrong(scheduler, "timestep_type", "'discrete', where the network counts training steps")
    steps = scheduler.get("num_train_timesteps", FLOW_STEPS if kind in FLOWS else None)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 100_000:
        raise _wrong(scheduler, "num_train_timesteps", "a number of steps from 1 to 100000")
    if is_flow(scheduler):
        if steps != FLOW_STEPS:
            raise _wrong(scheduler, "num_train_timesteps", f"{FLOW_STEPS} for a rectified flow")
        if scheduler.get("invert_sigmas"):
            raise _wrong(scheduler, "invert_sigmas", "false, since timesteps count from the image to noise here")
    elif scheduler.get("trained_betas") is not None:
        betas = scheduler["trained_betas"]
        if not isinstance(betas, Sequence) or len(betas) != steps or not all(map(_is_beta, betas)):
            raise _wrong(scheduler, "trained_betas", f"{steps} numbers between 0 and 1")
    else:
        _check_betas(scheduler)


def _check_betas(scheduler: Config) -> None:
    schedule = scheduler.get("beta_schedule")
    if not isinstance(schedule, str) or schedule not in _ALPHAS:
        raise _wrong(scheduler, "beta_schedule", f"one of {', '.join(_ALPHAS)}")
    if schedule in _OF_ALPHA_BAR:
        return
    for key in ("beta_start", "beta_end"):
        if not _is_beta(scheduler.get(key)):
            raise _wrong(scheduler, key, "a number between 0 and 1")
    if scheduler["beta_start"] > scheduler["beta_end"]:
        raise _wrong(scheduler, "beta_start", f"at most beta_end, {scheduler['beta_end']!r}")


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def _wrong(scheduler: Config, key: str, expected: str) -> ValueError:
    """The error of a key that is missing or has a value that cannot be."""
    given = f"has {key} {repr(scheduler[key])[:60]}" if key in scheduler else f"has no {key}"
    return ValueError(
        f"{FILE} {given}, and the noise level of a timestep needs it; it must be {expected}. Write what the network "
        "was trained with there, or give noise='none'."
    )


def noise_level(scheduler: Config, timestep: float) -> tuple[float, float]:
    """(alpha, sigma) of z_t = alpha z + sigma noise at a timestep, from a scheduler's config.

    The arithmetic of diffusers' schedulers in plain floats; a fractional timestep is read at its integer part.

    Raises:
        ValueError: The schedule is not known here; see :func:`check_schedule`.
    """
    check_schedule(scheduler)
    if is_flow(scheduler):
        return 1 - timestep / FLOW_STEPS, timestep / FLOW_STEPS
    bars = alpha_bars(scheduler)
    if scheduler.get("rescale_betas_zero_snr"):
        bars = _ending_in_noise(bars)
    bar = bars[int(timestep)]
    return bar**0.5, (1 - bar) ** 0.5


def alpha_bars(scheduler: Config) -> list[float]:
    """The products of 1 - beta up to each training step."""
    if scheduler.get("trained_betas") is not None:
        kept = [1 - beta for beta in scheduler["trained_betas"]]
    else:
        alpha = _ALPHAS[scheduler["beta_schedule"]]
        kept = [alpha(scheduler, t) for t in range(scheduler["num_train_timesteps"])]
    return list(accumulate(kept, mul))


def _ending_in_noise(bars: list[float]) -> list[float]:
    """Without signal at the last step (https://arxiv.org/abs/2305.08891, algorithm 1)."""
    first, last = bars[0] ** 0.5, bars[-1] ** 0.5
    return [((bar**0.5 - last) * first / (first - last)) ** 2 for bar in bars]


def _power(power: int) -> Callable[[Config, int], float]:
    """1 - beta of one step, where beta or its root is linear."""

    def alpha(scheduler: Config, t: int) -> float:
        first, last = (scheduler[key] ** (1 / power) for key in ("beta_start", "beta_end"))
        beta: float = (first + (last - first) * t / max(scheduler["num_train_timesteps"] - 1, 1)) ** power
        return 1 - beta

    return alpha


def _sigmoid(scheduler: Config, t: int) -> float:
    """1 - beta of one step, where beta is a sigmoid from -6 to 6."""
    rising = 1 / (1 + math.exp(6 - 12 * t / max(scheduler["num_train_timesteps"] - 1, 1)))
    beta: float = scheduler["beta_start"] + rising * (scheduler["beta_end"] - scheduler["beta_start"])
    return 1 - beta


def _of_alpha_bar(alpha_bar: Callable[[float], float]) -> Callable[[Config, int], float]:
    """1 - beta of one step, where alpha_bar is a function of the share of steps and beta at most 0.999."""

    def alpha(scheduler: Config, t: int) -> float:
        before, after = (alpha_bar(step / scheduler["num_train_timesteps"]) for step in (t, t + 1))
        return max(after / before, 0.001)

    return alpha


def _cosine(share: float) -> float:
    """A squared cosine (https://arxiv.org/abs/2102.09672)."""
    return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(share: float) -> float:
    """The signal of a Laplace distribution of log-SNRs (https://arxiv.org/abs/2407.03297), a root as in diffusers."""
    log_snr = -0.5 * math.copysign(1, 0.5 - share) * math.log(1 - 2 * abs(0.5 - share) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


_OF_ALPHA_BAR = {"squaredcos_cap_v2": _of_alpha_bar(_cosine), "laplace": _of_alpha_bar(_laplace)}
_ALPHAS = {"linear": _power(1), "scaled_linear": _power(2), "sigmoid": _sigmoid, **_OF_ALPHA_BAR}
