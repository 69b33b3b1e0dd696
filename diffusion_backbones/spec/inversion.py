"""DDIM inversion as a scheduler's config states it: which timesteps it passes, between which noise levels. No torch.

From clean latents up, the network says at every step what the next noise level looks like
(https://arxiv.org/abs/2010.02502). What is read of a config, and what stands in for what it does not say, is as in
diffusers' ``DDIMInverseScheduler``: the network receives the timestep that a step goes to. One thing differs: a
config of a sampler that knows no ``clip_sample``, such as PNDM's, asks for no clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_backbones.spec.configs import Config, is_flow
from diffusion_backbones.spec.schedule import FILE, alpha_bars, check_schedule, ending_in_noise

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing")
CLIPPING = ("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers that clip predicted clean samples if their config says nothing of it; others then do not."""


@dataclass(frozen=True)
class Inversion:
    """The steps of a DDIM inversion. Made by :meth:`of`.

    Args:
        timesteps: What the network receives, growing, and where each step goes to.
        before: alpha_bar of the latents that a step begins with, one for each.
        after: alpha_bar of those that it gives.
        prediction: What the network predicts: ``epsilon``, ``v_prediction`` or ``sample``.
        clip: The largest value of predicted clean latents; None for no limit.
    """

    timesteps: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    prediction: str
    clip: float | None

    @classmethod
    def of(cls, scheduler: Config, steps: int) -> Inversion:
        """The inversion in ``steps`` steps over the whole schedule.

        Raises:
            ValueError: The schedule has none: it is a rectified flow, unknown, shorter, or spaced or trained otherwise.
        """
        check_schedule(scheduler)
        if is_flow(scheduler):
            raise ValueError(
                "noise='inversion' is DDIM's, for networks that were trained on a diffusion, and this one was trained "
                "on a rectified flow; use noise='fixed'"
            )
        prediction = scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise _unknown("prediction_type", prediction, PREDICTIONS)
        bars = alpha_bars(scheduler)
        if scheduler.get("rescale_betas_zero_snr"):
            bars = ending_in_noise(bars)
        if steps > len(bars):
            raise ValueError(f"inversion_steps must be at most {len(bars)}, the steps of the schedule, got {steps}")
        clean = 1.0 if scheduler.get("set_alpha_to_one", True) else bars[0]
        if prediction == "sample" and clean == 1.0:
            raise ValueError(
                f"{FILE} has prediction_type 'sample' and set_alpha_to_one, from which no first step of an inversion "
                "follows; use noise='fixed'"
            )
        timesteps = _spaced(scheduler, steps, len(bars))
        clips = scheduler.get("clip_sample", scheduler.get("_class_name") in CLIPPING)
        starts = [t - len(bars) // steps for t in timesteps]
        return cls(
            timesteps=timesteps,
            before=tuple(bars[t] if t >= 0 else clean for t in starts),
            after=tuple(bars[t] for t in timesteps),
            prediction=prediction,
            clip=scheduler.get("clip_sample_range", 1.0) if clips else None,
        )

    def passed(self, timesteps: Sequence[Any]) -> tuple[int, ...]:
        """The timesteps of the steps that lead to some.

        Args:
            timesteps: Numbers, where the inversion is read.

        Raises:
            ValueError: It does not come by one of them; the nearest are named.
        """
        for t in timesteps:
            if t not in self.timesteps:
                near = sorted(sorted(self.timesteps, key=lambda known: abs(known - t))[:2])
                raise ValueError(
                    f"an inversion in {len(self.timesteps)} steps does not come by timestep {t}; the nearest that it "
                    f"passes: {', '.join(map(str, near))}. Give one of them, or another inversion_steps="
                )
        return tuple(t for t in self.timesteps if t <= max(timesteps))


def _spaced(scheduler: Config, steps: int, n: int) -> tuple[int, ...]:
    spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
    if spacing not in SPACINGS:
        raise _unknown("timestep_spacing", spacing, SPACINGS)
    if spacing == "trailing":
        return tuple(round(n - i * n / steps) - 1 for i in reversed(range(steps)))
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset <= n - 1 - (steps - 1) * (n // steps):
        raise ValueError(
            f"{FILE} has steps_offset {offset!r}, with which {steps} steps of an inversion leave the schedule"
        )
    return tuple(i * (n // steps) + offset for i in range(steps))


def _unknown(key: str, value: object, known: Sequence[str]) -> ValueError:
    return ValueError(
        f"{FILE} has {key} {value!r}, and DDIM inversion is known for {' and '.join(known)}; use noise='fixed'"
    )
