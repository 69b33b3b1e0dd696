"""Latents of every training picture at one size, in several views, made once and kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from vae_stage import crops, to_signal

SCALES = (0.67, 0.75, 0.83, 0.92)
"""Of the crops' sides, in turn; a chunk shares one."""


def view(images: Tensor, which: Tensor, side: int, scale: float, generator: torch.Generator) -> Tensor:
    """Signals (B, 3, side, side): crops of ``scale`` times a picture's side, half of them mirrored."""
    x = to_signal(crops(images, which, round(scale * images.shape[1]), generator))
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True).clamp(-1, 1)


def fingerprint(vae: AutoencoderKL) -> str:
    """A digest of the weights."""
    digest = hashlib.sha256()
    for value in vae.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def pool(vae: AutoencoderKL, images: Tensor, side: int, views: int, cache: Path, seed: int, data: str) -> Tensor:
    """Modes (views, N, 4, side / 8, side / 8), unscaled, float16, mapped from a file that is gone on with.

    View 0 is the whole picture; in the others a crop is taken, and half of all are mirrored.
    """
    device, size = next(vae.parameters()).device, 256 if images.device.type == "cuda" else 16
    shape = (views, len(images), 4, side // 8, side // 8)
    target, mark = cache / f"latents-{side}.npy", cache / f"latents-{side}.json"
    made = {"vae": fingerprint(vae), "views": views, "seed": seed, "data": data, "done": 0}
    if mark.is_file() and {**json.loads(mark.read_text()), "done": 0} == made:
        made = json.loads(mark.read_text())
    else:
        cache.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(target, "w+", np.float16, shape).flush()
    z = np.load(target, mmap_mode="r+")
    chunks = [(v, i) for v in range(views) for i in range(0, len(images), size)]
    generator = torch.Generator(device)
    for number, (v, i) in enumerate(tqdm(chunks, desc=f"latents of {side} x {side}", mininterval=20)):
        if number < made["done"]:
            continue
        generator.manual_seed(seed * 1_000_003 + number)
        scale = SCALES[number % len(SCALES)] if v else 1.0
        x = view(images, torch.arange(i, min(i + size, len(images)), device=images.device), side, scale, generator)
        z[v, i : i + size] = vae.encode(x).latent_dist.mode().half().cpu().numpy()
        if number % 50 == 49 or number + 1 == len(chunks):
            z.flush()
            mark.write_text(json.dumps({**made, "done": number + 1}))
    return torch.from_numpy(np.load(target, mmap_mode="c"))
