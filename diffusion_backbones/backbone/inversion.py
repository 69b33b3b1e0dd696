"""Noisy latents by DDIM inversion: the network itself says step by step which noise leads to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion_backbones.backbone.out_of_memory import explain_oom
from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.ops import micro_batching, noise
from diffusion_backbones.ops.inversion import invert
from diffusion_backbones.ops.noise import Timestep
from diffusion_backbones.surgery import compilation


@torch.no_grad()
def inverted(
    backbone: BackboneState,
    z: Tensor,
    size: tuple[int, int],
    conditioning: Mapping[str, Tensor],
    timesteps: Sequence[Timestep],
    chunk: int | None,
) -> list[Tensor]:
    """Clean latents -> (B, C, h, w) noisy ones at each of some timesteps, in float32 at least, all on one way up from
    the image. No gradient goes through it.

    Args:
        backbone: Whose network is whole.
        z: (B, C, h, w) clean latents.
        size: Height and width in pixels of the image before padding.
        conditioning: With a batch axis of B.
        timesteps: Where the way is read.
        chunk: The most images that the network is run on at once; None for all.

    Raises:
        ValueError: The way does not come by a timestep, or they differ from image to image.
    """
    inversion = backbone.plan.inversion
    assert inversion is not None
    if any(isinstance(t, Tensor) for t in timesteps):
        raise ValueError("noise='inversion' takes timesteps as numbers, which hold for all images of a call")
    parts: list[list[Tensor]] = []
    for images, _ in micro_batching.split(1, z.shape[0], chunk):
        text = {name: rows[images] for name, rows in conditioning.items()}
        z_t, found = z[images].to(torch.promote_types(z.dtype, torch.float32)), {}
        for step, timestep in enumerate(inversion.passed(timesteps)):
            with backbone.at_timestep(timestep):
                z_t = invert(inversion, step, z_t, _predict(backbone, z_t, size, timestep, text))
            found[timestep] = z_t
        parts.append([found[int(t)] for t in timesteps])
    return [torch.cat(some) for some in zip(*parts, strict=True)]


@explain_oom("denoiser")
def _predict(
    backbone: BackboneState, z_t: Tensor, size: tuple[int, int], timestep: int, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """What the whole network predicts; some predict a variance behind it, which inversion does without."""
    t = noise.timesteps(timestep, z_t.shape[0], z_t.device)
    given = compilation.prepare_input(backbone, z_t.to(backbone.dtype))
    with compilation.compile_context(backbone, backbone.denoiser, given):
        output = backbone.architecture.call(backbone.denoiser, given, t, conditioning, size)
    return output[:, : z_t.shape[1]].to(z_t.dtype)
