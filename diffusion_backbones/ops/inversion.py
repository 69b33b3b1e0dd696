"""One step of a DDIM inversion, as diffusers' ``DDIMInverseScheduler`` computes it."""

from __future__ import annotations

from torch import Tensor

from diffusion_backbones.spec.inversion import Inversion


def invert(inversion: Inversion, step: int, z: Tensor, predicted: Tensor) -> Tensor:
    """Latents at the noise level before a step -> those at the level after it.

    Args:
        inversion: The steps.
        step: Which of them.
        z: (B, C, h, w).
        predicted: What the network gave for ``z`` at the step's timestep, of the same shape.
    """
    before, after = inversion.before[step], inversion.after[step]
    alpha, sigma = before**0.5, (1 - before) ** 0.5
    if inversion.prediction == "epsilon":
        clean, noise = (z - sigma * predicted) / alpha, predicted
    elif inversion.prediction == "v_prediction":
        clean, noise = alpha * z - sigma * predicted, alpha * predicted + sigma * z
    else:
        clean, noise = predicted, (z - alpha * predicted) / sigma
    if inversion.clip is not None:
        clean = clean.clamp(-inversion.clip, inversion.clip)
    noisy: Tensor = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return noisy
