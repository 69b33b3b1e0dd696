"""What a backbone keeps in memory: whole, in eight bits, and with a block at a time on the GPU. Built on meta, so that
nothing is loaded.

    python scripts/memory.py sd15_gdf sdxl_gdf flux_dev_ditf --dtype bfloat16
    python scripts/memory.py tinysd_gdf --deviation docs/cat.jpg

Bytes are arithmetic on shapes. ``--deviation`` runs a backbone on a photograph, whole and in eight bits, and prints for
each level the cosine similarity of the two, averaged over positions, the norm of the difference as a share of the norm,
and how much longer a call takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import diffusion_backbones as db
from diffusion_backbones.extraction import images
from diffusion_backbones.surgery import memory_budget


class Bytes(NamedTuple):
    """Of the weights of a backbone.

    Attributes:
        encoder, denoiser: Of the parts, whole.
        int8: Of the denoiser in eight bits.
        block: Of the largest block that group offloading moves.
        outside: Of what is in no block, and stays on the GPU while the denoiser runs.
    """

    encoder: int
    denoiser: int
    int8: int
    block: int
    outside: int


def measure(name: str, dtype: torch.dtype) -> Bytes:
    """The bytes of a registered backbone, on ``meta``."""
    backbone, rounded = (
        db.create_model(name, device="meta", dtype=dtype, weight_dtype=weight_dtype) for weight_dtype in (None, "int8")
    )
    denoiser, encoder = backbone.denoiser, next(backbone.encoder.parameters(), torch.empty(0, dtype=dtype)).dtype
    blocks = [
        size(block, dtype)
        for child in denoiser.children()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
        for block in child
    ]
    return Bytes(
        encoder=size(backbone.encoder, encoder),
        denoiser=size(denoiser, dtype),
        int8=sum(held(tensor) for tensor in rounded.denoiser.state_dict().values()),
        block=max(blocks),
        outside=size(denoiser, dtype) - sum(blocks),
    )


def size(network: nn.Module, dtype: torch.dtype) -> int:
    return memory_budget.weights([(network, dtype)])


def held(tensor: Any) -> int:
    """Bytes of a tensor, or of what torchao makes one of."""
    return (
        sum(getattr(tensor, part).nbytes for part in tensor.tensor_data_names)
        if hasattr(tensor, "tensor_data_names")
        else tensor.nbytes
    )


@torch.inference_mode()
def deviation(name: str, photo: str, rounds: int = 5) -> tuple[list[tuple[float, float]], float]:
    """(cosine similarity, relative difference) of every level in eight bits, and the seconds of a call as a multiple of
    those without.

    Args:
        name: A backbone with weights.
        photo: A picture.
        rounds: How often each is timed, in turn.
    """
    whole, rounded = (db.create_model(name, pretrained=True, weight_dtype=dtype) for dtype in (None, "int8"))
    x = images.transform(whole.pretrained_cfg, None, False)(Image.open(photo).convert("RGB"))[None]
    levels = [(_cosine(a, b), float((a - b).norm() / a.norm())) for a, b in zip(whole(x), rounded(x), strict=True)]
    ratios = [_seconds(rounded, x) / _seconds(whole, x) for _ in range(rounds)]
    return levels, statistics.median(ratios)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=1).mean())


def _seconds(backbone: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    backbone(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--deviation", metavar="PHOTO")
    arguments = parser.parse_args()
    for name in arguments.names:
        kept = measure(name, getattr(torch, arguments.dtype))
        print(
            f"{name} in {arguments.dtype}, GB: "
            + ", ".join(f"{part} {number / 1e9:.2f}" for part, number in kept._asdict().items())
        )
        if arguments.deviation:
            levels, ratio = deviation(name, arguments.deviation)
            print(
                "\n".join(
                    f"  level {i}: cosine {cosine:.5f}, difference {difference:.4f}"
                    for i, (cosine, difference) in enumerate(levels)
                )
            )
            print(f"  a call takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
