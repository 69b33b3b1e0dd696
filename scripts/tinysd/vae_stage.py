"""The first stage: a VAE that keeps the detail of photographs."""

from __future__ import annotations

from collections.abc import Sequence

import model
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import Loop, Losses, Setting
from torch import Tensor


def to_signal(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) -> (B, 3, S, S) in [-1, 1]."""
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # in channels_last, which a GPU is fast in
    return x if x.device.type == "cuda" else x.contiguous()


def crops(images: Tensor, which: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Random crops (B, side, side, 3) of ``images`` (N, S, S, 3), mirrored half the time, on their device."""
    n, device = len(which), images.device
    corner = torch.randint(images.shape[1] - side + 1, (2, n, 1), generator=generator, device=device)
    along = torch.arange(side, device=device)
    mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
    y, x = corner[0] + along, corner[1] + torch.where(mirrored, along.flip(0), along)
    return images[which[:, None, None], y[:, :, None], x[:, None, :]]


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction(vae: AutoencoderKL, x: Tensor, noise: Tensor) -> Losses:
    """Squared error of pixels, absolute error of their differences (outlines stay sharp), and a small KL term."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample.float()
    outlines = torch.stack([F.l1_loss(a, b) for a, b in zip(edges(x), edges(y), strict=True)]).sum()
    kl = posterior.kl().mean() / posterior.mean[0, 0].numel()  # for each latent position
    return {"pixels": 10 * F.mse_loss(y, x), "outlines": 0.1 * outlines, "kl": 2e-4 * kl.float()}


def train(
    setting: Setting,
    images: Tensor,
    minutes: float,
    batch: int,
    crop: int,
    start: dict[str, Tensor] | None,
    widths: tuple[int, ...],
    lr: float,
) -> AutoencoderKL:
    """Train on random crops of ``images`` (N, S, S, 3) uint8, all of them training pictures."""
    torch.manual_seed(setting.seed)
    loop = Loop(setting, "vae", model.vae(widths), minutes, lr, {"VAE widths": list(widths)}, may_be_slow=True)
    if start:
        loop.start_from(start)
    vae, device = loop.model, setting.device

    def sample(_: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        which = torch.randint(len(images), (batch,), generator=generator, device=device)
        noise = torch.randn(batch, 4, crop // 8, crop // 8, generator=generator, device=device)
        return to_signal(crops(images, which, crop, generator)), noise

    def loss_of(x: Tensor, noise: Tensor) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return reconstruction(vae, x, noise)

    trained: AutoencoderKL = loop.run(sample, loss_of)
    return trained


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor, which: Sequence[int] | np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each of these whole pictures, from the posterior's mode in 8 bits."""
    found = []
    device = next(vae.parameters()).device
    for part in np.array_split(np.asarray(which), max(1, len(which) // 8)):
        pixels = images[torch.from_numpy(part).to(images.device)].to(device)
        y = vae.decode(vae.encode(to_signal(pixels)).latent_dist.mode()).sample
        y = ((y.float().clamp(-1, 1) + 1) * 127.5).round() / 255
        error = (y - pixels.permute(0, 3, 1, 2) / 255).square().mean((1, 2, 3))
        found.append(-10 * error.log10().cpu().numpy())
    return np.concatenate(found)
