"""What ``fold=True`` drops, and what it does to time.

python benchmarks/folding.py count sd15_gdf sdxl_gdf flux_dev_ditf      at full size, without memory: weights are
overlapping views of a few numbers python benchmarks/folding.py time sd15_gdf --size 512                   random
weights, the same in both, turn by turn, with latents given
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.ops.truncation import count_parameters
from diffusion_backbones.surgery import constant_folding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["count", "time"])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--recipe", nargs="+", help="activation ids, where names are checkpoints")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, given.dtype))
    for name in given.names:
        print(
            count(name, given.recipe) if given.what == "count" else timed(name, given.recipe, given.size, given.rounds),
            flush=True,
        )


def count(name: str, recipe: list[str] | None) -> str:
    backbone = filled(name, recipe, overlapping)
    denoiser = backbone.denoiser
    before, start = count_parameters(denoiser), time.perf_counter()
    fold(backbone)
    seconds, after = time.perf_counter() - start, count_parameters(denoiser)
    values = sum(
        output.numel()
        for constant in constant_folding.constants(denoiser).values()
        for output in constant.outputs
        if output is not None
    )
    dropped = before - after
    return (
        f"{name}: {before / 1e6:.1f} M parameters, {dropped / 1e6:.1f} M dropped ({dropped / before:.1%}) for "
        f"{values / 1e6:.2f} M values in "
        f"{len(constant_folding.constants(denoiser))} places; {seconds:.0f} s"
    )


def filled(name: str, recipe: list[str] | None, weights: Callable[[Sequence[int]], Tensor]) -> db.DiffusionBackbone:
    """A backbone whose denoiser is on the CPU and whose image encoder is nowhere."""
    backbone = db.create_model(name, recipe=recipe, device="meta")
    safetensors_io.fill(
        backbone.denoiser, [(key, weights(tensor.shape)) for key, tensor in backbone.denoiser.state_dict().items()]
    )
    backbone.architecture.fill_buffers(backbone.denoiser, torch.device("cpu"))
    backbone.conditioning = type(backbone.conditioning)(backbone.architecture.blank_conditioning())
    return backbone


def overlapping(shape: Sequence[int]) -> Tensor:
    """A tensor of any shape on the memory of its sides, element i, j at i + j: rows and columns differ."""
    return (0.02 * torch.randn(sum(shape) + 1)).as_strided(tuple(shape), [1] * len(shape))


def tiled(shape: Sequence[int]) -> Tensor:
    """A tensor of any shape, a million random numbers over and over, as all of them take minutes in a large network;
    norms and biases of one.
    """
    if len(shape) < 2:
        return torch.ones(shape)
    count, tile = math.prod(shape), 0.02 * torch.randn(2**20)
    return tile.repeat(-(-count // len(tile)))[:count].clone().view(tuple(shape))


def timed(name: str, recipe: list[str] | None, size: int, rounds: int) -> str:
    plain = filled(name, recipe, tiled)
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    folded = copy.deepcopy(plain, shared)
    fold(folded)
    z = torch.randn(1, plain.latent_channels, size // plain.latent_stride, size // plain.latent_stride)
    seconds: dict[db.DiffusionBackbone, list[float]] = {plain: [], folded: []}
    with torch.inference_mode():
        maps = {backbone: backbone.forward_latents(z, noise="none") for backbone in seconds}
        for _ in range(rounds):
            for backbone, times in seconds.items():
                start = time.perf_counter()
                backbone.forward_latents(z, noise="none")
                times.append(time.perf_counter() - start)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(maps[plain], maps[folded], strict=True))
    one, other = (statistics.median(times) for times in seconds.values())
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return (
        f"{name} at {size}, {z.dtype}, {torch.get_num_threads()} threads: {one:.3f} s, folded {other:.3f} s, median "
        f"ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}); features differ by {worst:.1e} of their largest"
    )


def fold(backbone: db.DiffusionBackbone) -> None:
    conditioning, timestep = dict(backbone.conditioning.items()), backbone.declaration.recipe.timestep
    constant_folding.fold(backbone.denoiser, backbone.architecture, conditioning, [timestep], backbone.catalogue.all())


if __name__ == "__main__":
    main()
