"""Image encoders on the CPU in the stock layout and with channels innermost: how fast, and how exact.

    python benchmarks/encoder.py [NAME:SIZE:BATCH ...]

A line for each: milliseconds an image in the stock layout and in the other, their ratio (the median over rounds, each
of which timed both), and how far the latents of each are from those computed in float64, as a share of the largest
value. The image is docs/cat.jpg. Weights are random but for ``tinysd``; ``NAME+tiny`` is the tiny encoder of a
checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import diffusion_backbones as db
from diffusion_backbones.evaluation.benchmark import alternate

PHOTO = Path(__file__).parents[1] / "docs" / "cat.jpg"
DEFAULT = ("sd15:512:1", "sd15+tiny:512:1", "tinysd:256:1", "tinysd:512:1", "tinysd+tiny:512:1")


@torch.inference_mode()
def measure(name: str, size: int, batch: int, rounds: int) -> str:
    torch.manual_seed(0)
    checkpoint, _, tiny = name.partition("+")
    backbone = db.create_model(
        checkpoint, pretrained=not db.get_checkpoint(checkpoint).hub_id, recipe=["unet-in"], encoder=tiny or None
    )
    encoder = backbone.encoder
    x = pil_to_tensor(Image.open(PHOTO).convert("RGB").resize((size, size)))[None].repeat(batch, 1, 1, 1) / 127.5 - 1
    inner = x.contiguous(memory_format=torch.channels_last)
    seconds = alternate({"stock": partial(encoder.encode, x), "innermost": partial(encoder.encode, inner)}, rounds)
    latents = [_latents(encoder, images) for images in (x, inner)]
    exact = _latents(encoder.double(), x[:1].double())
    errors = [float((z[:1] - exact).abs().max() / exact.abs().max()) for z in latents]
    stock, ours = (1000 * statistics.median(times) / batch for times in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return (
        f"{name} {size} px, batch {batch}: {stock:.1f} ms and {ours:.1f} ms, {ratio:.2f}x; errors {errors[0]:.1e} "
        f"and {errors[1]:.1e}"
    )


def _latents(encoder: Any, x: Tensor) -> Tensor:
    z = encoder.encode(x, return_dict=False)[0]
    return z.mode() if hasattr(z, "mode") and not isinstance(z, Tensor) else z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=DEFAULT, metavar="NAME:SIZE:BATCH", help=f"default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for one in args.what:
        name, size, batch = one.split(":")
        print(measure(name, int(size), int(batch), args.rounds), flush=True)


if __name__ == "__main__":
    main()
