"""How much faster image encoders are on the CPU with channels innermost, which the backbone chooses there, than as images come.

    python benchmarks/encoder.py [NAME:SIZE:BATCH ...]

A line for each: milliseconds an image with the stock layout and with the other, their ratio (the median over rounds, each of which timed both), the largest
difference of the latents as a share of the largest value, and operations a second as a share of those of a matrix product. Weights are random. ``NAME+tiny``
is the tiny encoder of a checkpoint.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from diffusion_backbones import get_checkpoint
from diffusion_backbones.bench import alternate, matmul_gflops
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.probe import gflops
from diffusion_backbones.registry import package_configs, packaged

DEFAULT = ("sd15:512:1", "sd15+tiny:512:1", "tinysd:256:1", "tinysd:256:4")


@torch.inference_mode()
def measure(name: str, size: int, batch: int, rounds: int, product: float) -> str:
    checkpoint = get_checkpoint(name.removesuffix("+tiny"))
    family, configs = FAMILIES[checkpoint.family], package_configs(checkpoint)
    if name.endswith("+tiny"):
        configs[family.encoder] = packaged(checkpoint.tiny_encoder)
    kind = family.image_encoder(configs)
    torch.manual_seed(0)
    encoder = kind.truncate(kind.build(family.encoder_config(configs))).eval()
    x = torch.rand(batch, 3, size, size) * 2 - 1
    ways = {"stock": lambda: encoder.encode(x), "innermost": lambda: kind.encode(encoder, x)}
    seconds = alternate(ways, rounds)
    stock, ours = (statistics.median(times) for times in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    inner = kind.encode(encoder, x)
    encoder.encoder.register_forward_pre_hook(lambda module, images: tuple(image.contiguous() for image in images))
    plain = kind.encode(encoder, x)
    difference = float((inner - plain).abs().max() / plain.abs().max())
    with torch.device("meta"):
        empty, pixels = kind.truncate(kind.build(family.encoder_config(configs))), torch.empty(batch, 3, size, size)
    share = gflops(kind.encode, empty, pixels) / ours / product
    where = f"{name} {size} px, batch {batch}"
    return f"{where:28} {1000 * stock / batch:8.1f} {1000 * ours / batch:8.1f} ms  {ratio:.2f}x  {difference:.1e}  {share:.2f} of {product:.0f} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=DEFAULT, metavar="NAME:SIZE:BATCH", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    product = matmul_gflops()
    for one in args.what:
        name, size, batch = one.split(":")
        print(measure(name, int(size), int(batch), args.rounds, product), flush=True)


if __name__ == "__main__":
    main()
