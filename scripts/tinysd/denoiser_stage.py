"""The second and third stage: the U-Net with its text encoder, by v-prediction on latents that stay on the device."""

from __future__ import annotations

import model
import torch
from diffusers import DDPMScheduler
from loop import Loop, Losses, Setting
from model import Denoiser
from torch import Tensor
from transformers import CLIPTokenizer

DROPPED = 0.1
"""Share of captions that are dropped, for guidance and because features are read under the empty prompt."""
SNR = 5.0
"""Where the weights of min-SNR stop to grow (Hang et al., arXiv 2303.09556)."""
EVERY = 4
"""One step in so many is on the smaller latents in the stage of both sizes."""


def noise_tables(device: torch.device) -> Tensor:
    """(3, 1000): by timestep the factors of signal and noise, and the weight of the squared error of v."""
    products = DDPMScheduler(**model.NOISE).alphas_cumprod.to(device)
    ratio = products / (1 - products)
    return torch.stack([products.sqrt(), (1 - products).sqrt(), ratio.clamp(max=SNR) / (ratio + 1)])


def squared_error(network: Denoiser, tables: Tensor, z: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Losses:
    """Weighted squared error of v, scaled so that the weights' mean is 1."""
    a, s, weight = tables[:, t][..., None, None, None]
    v = network(a * z + s * noise, t, ids).float()
    error = (v - (a * noise - s * z)).square()
    return {"v": (weight / tables[2].mean() * error).mean()}


class Sampler:
    """Draws what a step sees from pools of latents (views, N, 4, h, w) and their captions' ids (N, 77)."""

    def __init__(self, pools: list[Tensor], scale: float, ids: Tensor, empty: Tensor, batch: int, device: torch.device):
        self.pools, self.scale, self.ids, self.empty, self.batch, self.device = pools, scale, ids, empty, batch, device

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Scaled latents, noise, timesteps and ids; ``batch`` counts pictures of 128 x 128."""
        pool = self.pools[0] if step % EVERY == 0 else self.pools[-1]
        n = max(2, round(self.batch * 256 / pool[0, 0, 0].numel()))
        draw = {"generator": generator, "device": self.device}
        which = torch.randint(pool.shape[1], (n,), **draw)
        views = torch.randint(pool.shape[0], (n,), **draw)
        place = pool.device  # a pool that is mapped from a file on a CPU
        z = pool[views.to(place), which.to(place)].to(self.device).float() * self.scale
        noise = torch.randn(z.shape, **draw)
        # Stratified: less variance than independent draws.
        t = ((torch.arange(n, device=self.device) + torch.rand(n, **draw)) / n * 1000).long().clamp(max=999)
        dropped = torch.rand(n, 1, **draw) < DROPPED
        return z, noise, t, torch.where(dropped, self.empty, self.ids[which])


def train(
    setting: Setting,
    name: str,
    sampler: Sampler,
    tokens: CLIPTokenizer,
    minutes: float,
    lr: float,
    start: dict[str, Tensor] | None,
    widths: tuple[int, ...],
) -> Denoiser:
    """Train for a box of minutes, from ``start`` where this stage has no state yet."""
    torch.manual_seed(setting.seed)
    shape = {"U-Net widths": list(widths), "vocabulary": len(tokens)}
    loop = Loop(setting, name, model.denoiser(tokens, widths), minutes, lr, shape)
    if start:
        loop.start_from(start)
    tables, network, device = noise_tables(setting.device), loop.model, setting.device

    def loss_of(z: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return squared_error(network, tables, z, noise, t, ids)

    trained: Denoiser = loop.run(sampler, loss_of)
    return trained
