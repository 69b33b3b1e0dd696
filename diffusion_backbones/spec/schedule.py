"""Noise levels of a timestep from a scheduler's config, in plain floats: no torch."""

from __future__ import annotations

import math

from diffusion_backbones.spec.configs import Config, is_flow


def noise_level(scheduler: Config, timestep: float) -> tuple[float, float]:
    """(alpha, sigma) of z_t = alpha z + sigma noise at a timestep, from a scheduler's config.

    The arithmetic of diffusers' schedulers in plain floats; a fractional timestep is read at its integer part.

    Raises:
        KeyError: A beta schedule that no checkpoint here has.
    """
    if is_flow(scheduler):
        return 1 - timestep / 1000, timestep / 1000
    kept = _cosine if scheduler["beta_schedule"] == "squaredcos_cap_v2" else _power
    alpha_bar = math.prod(kept(scheduler, t) for t in range(int(timestep) + 1))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _power(scheduler: Config, t: int) -> float:
    """1 - beta of one step, where beta or its root is linear."""
    power = {"scaled_linear": 2, "linear": 1}[scheduler["beta_schedule"]]
    first, last = (scheduler[key] ** (1 / power) for key in ("beta_start", "beta_end"))
    beta: float = (first + (last - first) * t / (scheduler["num_train_timesteps"] - 1)) ** power
    return 1 - beta


def _cosine(scheduler: Config, t: int) -> float:
    """1 - beta of one step, where alpha_bar is a squared cosine and beta at most 0.999 (https://arxiv.org/abs/2102.09672)."""
    before, after = (
        math.cos((step / scheduler["num_train_timesteps"] + 0.008) / 1.008 * math.pi / 2) ** 2 for step in (t, t + 1)
    )
    return max(after / before, 0.001)
