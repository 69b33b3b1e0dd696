"""Train the tiny image encoder of tinysd, which ``create_model("tinysd_gdf", encoder="tiny")`` takes in place of its
VAE's.

    python scripts/tinysd/tiny_encoder.py build/tinysd/pack build/tinysd/tiny   # goes on from where it was interrupted

``train.py --export`` writes the folder of the checkpoint anew, so this comes after it.

A convolutional network (the encoder of diffusers' ``AutoencoderTiny``) learns to give the mode of the VAE's posterior,
scaled as the U-Net takes it. The VAE is the one in the package. It sees whole pictures and not crops: its group norms
and its attention are over the whole image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pack
import speed
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from latents import view
from loop import Loop, Setting
from torch import Tensor, nn

from diffusion_backbones.ops import safetensors_io

CHECKPOINT = Path(__file__).parents[2] / "diffusion_backbones/configs/tinysd"
TARGET = CHECKPOINT / "vae/tiny"
TINY = {
    "encoder_block_out_channels": (24,) * 4,
    "num_encoder_blocks": (0, 0, 2, 3),
    "decoder_block_out_channels": (24,) * 4,
    "num_decoder_blocks": (1,) * 4,
    "latent_channels": 4,
}
"""Thin where the image is large: a seventh of the operations of the VAE's encoder. The decoder is never written."""


def train(setting: Setting, images: Tensor, minutes: float, batch: int) -> nn.Module:
    """Squared error of the scaled latents, on whole pictures of 128 x 128 and of 192 x 192 in turn."""
    torch.manual_seed(setting.seed)
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).to(setting.device).eval()
    vae.decoder = None
    tiny = AutoencoderTiny(**TINY).encoder
    loop = Loop(setting, "tiny_encoder", tiny, minutes, 2e-3, {"widths": list(TINY["encoder_block_out_channels"])})

    def sample(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        side = (128, images.shape[1])[step % 2]
        n = max(2, batch * 128**2 // side**2)
        which = torch.randint(len(images), (n,), generator=generator, device=setting.device)
        x = view(images, which, side, 1.0, generator)
        with torch.no_grad():
            return x, vae.encode(x).latent_dist.mode() * vae.config.scaling_factor

    trained: nn.Module = loop.run(sample, lambda x, z: {"latents": F.mse_loss(loop.model(x), z)})
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
    parser.add_argument("pack", type=Path, help="what photographs.py wrote")
    parser.add_argument("folder", type=Path, help="its state")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training (default 30)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures of 128 x 128 (default 16)")
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    packed = pack.load(args.pack)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = speed.matrix_product(device)
    setting = Setting(args.folder, device, 0, packed.digest, 2.0, True, False, peak=peak)
    pixels = torch.from_numpy(pack.pixels(packed, args.folder / "pixels"))[: packed.training].to(device)
    for path in export(train(setting, pixels, args.minutes, args.batch), args.out):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
