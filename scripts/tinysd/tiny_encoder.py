"""Train the tiny image encoder of tinysd, which ``create_model("tinysd_gdf", encoder="tiny")`` takes in place of its
VAE's.

    python scripts/tinysd/data.py build/tinysd_tiny --small 2000 --large 600
    python scripts/tinysd/tiny_encoder.py build/tinysd_tiny           # goes on from where it was interrupted, then
    writes the encoder

``train.py`` writes the folder of the checkpoint anew, so this comes after it.

A convolutional network (the encoder of diffusers' ``AutoencoderTiny``) learns to give the mode of the VAE's posterior,
scaled as the U-Net takes it. The VAE is the one in the package. It sees whole scenes and not crops: its group norms and
its attention are over the whole image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from tqdm import tqdm
from train import ROOT, Training

from diffusion_backbones.ops import safetensors_io

CHECKPOINT = ROOT / "diffusion_backbones/configs/tinysd"
TARGET = CHECKPOINT / "vae/tiny"
TINY = {
    "encoder_block_out_channels": (24,) * 4,
    "num_encoder_blocks": (0, 0, 2, 3),
    "decoder_block_out_channels": (24,) * 4,
    "num_decoder_blocks": (1,) * 4,
    "latent_channels": 4,
}
"""Thin where the image is large: a seventh of the operations of the VAE's encoder. The decoder is never written."""


def targets(folder: Path, side: int) -> tuple[np.ndarray, Tensor]:
    """Scenes of one size, (N, S, S, 3) uint8, and their latents (N, 4, S / 8, S / 8), mode of the posterior, scaled."""
    images = np.load(folder / f"scenes-{side}.npy", mmap_mode="r")
    path = folder / f"modes-{side}.pt"
    if not path.is_file():
        device = Accelerator().device
        vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).to(device).eval()
        vae.decoder = None
        with torch.no_grad():
            chunks = tqdm(range(0, len(images), 8), desc=path.name, mininterval=5)
            parts = [vae.encode(pixels(images[i : i + 8]).to(device)).latent_dist.mode().cpu() for i in chunks]
        torch.save(torch.cat(parts) * vae.config.scaling_factor, path)
    return images, torch.load(path)


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, S, S, 3) -> (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Distilled(nn.Module):
    """The encoder with its loss."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"latents": F.mse_loss(self.encoder(x), z)}


def train(folder: Path, steps: int, batch: int) -> nn.Module:
    """Squared error of the scaled latents, of 128 x 128 scenes and of 256 x 256 scenes in turn; half the pixels of each
    kind.
    """
    sets = [targets(folder, side) for side in (128, 256)]
    torch.manual_seed(0)
    tiny = AutoencoderTiny(**TINY)
    training = Training(folder, "tiny_encoder", Distilled(tiny.encoder), steps, 2e-3)

    def loss_of(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        which = training.step % 2
        images, z = sets[which]
        chosen = torch.randint(len(images), (batch // 4**which,), generator=generator)
        x = pixels(images[chosen.sort().values.numpy()])
        device = training.accelerator.device
        return model(x.to(device), z[chosen.sort().values].to(device))

    trained: nn.Module = training.run(loss_of).encoder
    return trained


def export(encoder: nn.Module, target: Path) -> Iterator[Path]:
    """Write it as a diffusers network of which only the encoder is there, in float16; yields the files."""
    tiny = AutoencoderTiny(**TINY)
    tiny.save_config(target)
    state = {f"encoder.{name}": tensor.half() for name, tensor in encoder.state_dict().items()}
    safetensors_io.write(target / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    yield from sorted(target.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3500, metavar="N", help="updates in all (default 3500)")
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="scenes of 128 x 128 in a step; a fourth as many of 256 x 256 (default 16)",
    )
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    if not (args.folder / "captions-256.json").is_file():
        parser.exit(
            1, f"{args.folder} holds no finished training data; run python scripts/tinysd/data.py {args.folder} first\n"
        )
    for path in export(train(args.folder, args.steps, args.batch), args.out):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
