"""Train tinysd in boxes of minutes: its VAE, its U-Net with its text encoder on small and then on larger pictures.

    python scripts/tinysd/photographs.py DATA build/tinysd/pack
    python scripts/tinysd/train.py build/tinysd/pack build/tinysd/run                  # on the GPU where there is one
    python scripts/tinysd/train.py build/tinysd/pack build/tinysd/run --cpu            # five hours on two cores
    python scripts/tinysd/train.py ... --from build/weights                            # on weights that came back
    python scripts/tinysd/train.py build/tinysd/pack build/tinysd/run --export diffusion_backbones/configs/tinysd

It can be killed at any time: every stage saves itself and goes on when it is started again with the same options, and
a stage whose minutes have passed is finished. ``STAGE.csv`` has its losses, ``STAGE/facts.json`` what it saw: digest of
the data, seed, batches and device. ``weights/`` has the averaged weights in float16, in files of at most 15 MiB.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import denoiser_stage
import latents
import model
import numpy as np
import pack
import speed
import state
import torch
import vae_stage
from diffusers import AutoencoderKL
from loop import Setting
from torch import Tensor
from transformers import CLIPTokenizer

STAGES = ("vae", "small", "large")
SMALL = 128
"""Width and height of the pictures of the second stage; the third has these and whole ones."""
GPU: dict[str, Any] = {
    "vae": 2.0,
    "small": 3.0,
    "large": 2.5,
    "vae_batch": 256,
    "vae_crop": 128,
    "batch": 1024,
    "views": 4,
    "large_views": 4,
}
CPU: dict[str, Any] = {
    "vae": 100.0,
    "small": 150.0,
    "large": 50.0,
    "vae_batch": 8,
    "vae_crop": 64,
    "batch": 24,
    "views": 2,
    "large_views": 1,
}
"""Minutes of every stage, and what a step takes."""


def widths(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"expected four widths, such as 64,128,192,192, got {text}")
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, help="what photographs.py wrote")
    parser.add_argument("folder", type=Path, help="states, tables and results")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    for name in STAGES:
        told = f"minutes of the stage {name} (default {GPU[name]:g} on a GPU, {CPU[name]:g} on a CPU)"
        parser.add_argument(f"--{name}", type=float, metavar="MINUTES", help=told)
    for name, what in (
        ("vae_batch", "crops in a step of the VAE"),
        ("vae_crop", "their side in pixels"),
        ("batch", "pictures of 128 x 128 in a step of the U-Net, fewer of larger ones"),
        ("views", "latents of every picture at 128 x 128, the whole one and crops"),
        ("large_views", "the same at 192 x 192"),
    ):
        told = f"{what} (default {GPU[name]} on a GPU, {CPU[name]} on a CPU)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=told)
    parser.add_argument("--vae-widths", type=widths, default=model.VAE_WIDTHS, metavar="A,B,C,D")
    parser.add_argument("--unet-widths", type=widths, default=model.UNET_WIDTHS, metavar="A,B,C,D")
    parser.add_argument("--vae-lr", type=float, default=1.5e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="FOLDER", help="weights/ of an earlier run to start on"
    )
    parser.add_argument("--save", type=float, default=4.0, metavar="MINUTES", help="between two states (default 4)")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="end all stages by then")
    parser.add_argument("--slow-ok", action="store_true", help=f"go on under {speed.LEAST:.0f} TFLOP/s on CUDA")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default on a GPU only)"
    )
    parser.add_argument("--threads", type=int, help="of a CPU (default all)")
    parser.add_argument(
        "--export", type=Path, metavar="TARGET", help="only write the diffusers folder of weights/ there"
    )
    parser.add_argument("--collect", action="store_true", help="only write weights/ of the latest states")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    for name, value in (GPU if args.device.type == "cuda" else CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.compile is None:
        args.compile = args.device.type == "cuda"
    return args


def check_memory(needed: float, free: float, device: str) -> None:
    """Refuse a device that is too small.

    Raises:
        SystemExit: ``needed`` bytes are more than ``free`` ones.
    """
    if needed > free:
        raise SystemExit(
            f"{device} has {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f}. Take smaller batches or another "
            "device."
        )


def prepare(args: argparse.Namespace, pixels: np.ndarray) -> Setting:
    """Ask the device what it can do, and say so."""
    began = time.monotonic()
    if args.device.type == "cuda":
        step = max(args.batch * 24e6, args.vae_batch * args.vae_crop**2 * 5e3)  # bytes, estimated and generous
        check_memory(1.2 * pixels.nbytes + step, torch.cuda.mem_get_info()[0], torch.cuda.get_device_name())
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    elif args.threads:
        torch.set_num_threads(args.threads)
    peak = speed.matrix_product(args.device)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: a matrix product reaches {peak:.3g} TFLOP/s", flush=True)
    seen = {"device": name, "vae_batch": args.vae_batch, "vae_crop": args.vae_crop, "batch": args.batch}
    return Setting(
        args.folder,
        args.device,
        args.seed,
        args.data,
        args.save,
        args.slow_ok,
        args.compile,
        began + args.deadline,
        peak,
        seen,
    )


def part(tensors: dict[str, Tensor] | None, name: str) -> dict[str, Tensor] | None:
    """The tensors of one network."""
    if tensors is None:
        return None
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def collect(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write the averaged weights of the latest states in float16, for a transfer, a later start or the export."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"VAE widths": list(args.vae_widths), "U-Net widths": list(args.unet_widths)}
    for stage in STAGES:
        found = state.read(args.folder / stage)
        if found is None:
            continue
        facts[stage] = found[1]
        network = "vae" if stage == "vae" else "denoiser"
        for key, value in (part(found[0], "average") or {}).items():
            tensors[f"{network}/{key}"] = value.half()
    if (args.folder / "measured.json").is_file():
        facts |= json.loads((args.folder / "measured.json").read_text())
    if tensors:
        state.write(args.folder / "weights", tensors, facts)
    return state.read(args.folder / "weights") or (tensors, facts)


def train(args: argparse.Namespace) -> None:
    """All stages that are not finished."""
    packed = pack.load(args.pack)
    args.data = packed.digest
    pixels = pack.pixels(packed, args.folder / "pixels")
    setting = prepare(args, pixels)
    earlier = state.read(args.start) if args.start else None
    if args.start and earlier is None:
        raise SystemExit(f"{args.start} holds no facts.json, expected weights/ of an earlier run.")
    start = earlier[0] if earlier else None
    if earlier:
        state.check(
            args.start, earlier[1], {"VAE widths": list(args.vae_widths), "U-Net widths": list(args.unet_widths)}
        )
    everything = torch.from_numpy(pixels).to(args.device)
    vae = vae_stage.train(
        setting,
        everything[: packed.training],
        args.vae,
        args.vae_batch,
        args.vae_crop,
        part(start, "vae"),
        args.vae_widths,
        args.vae_lr,
    )
    held_out = np.arange(packed.training, len(packed.rows))
    found = vae_stage.psnr(vae, everything, held_out[:: 1 if args.device.type == "cuda" else 4])
    print(f"VAE: {found.mean():.2f} dB on {len(found)} held-out photographs, median {np.median(found):.2f}", flush=True)
    measured = {"held-out dB": float(found.mean()), "held-out photographs": len(found)}
    if args.small + args.large > 0:
        train_denoiser(args, setting, packed, vae, everything[: packed.training], part(start, "denoiser"), measured)
    collect(args)


def train_denoiser(
    args: argparse.Namespace,
    setting: Setting,
    packed: pack.Pack,
    vae: AutoencoderKL,
    images: Tensor,
    weights: dict[str, Tensor] | None,
    measured: dict[str, float],
) -> None:
    """The stages on small and on larger pictures."""
    tokens, device = CLIPTokenizer.from_pretrained(args.pack / "tokenizer"), args.device
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokens([row.caption for row in packed.rows[: packed.training]], **padded).input_ids.to(device)
    empty = tokens("", **padded).input_ids.to(device)
    pools: list[Tensor] = []
    for stage, side, views in (("small", SMALL, args.views), ("large", pack.SIDE, args.large_views)):
        if stage == "large" and args.large <= 0:
            break
        pool = latents.pool(vae, images, side, views, args.folder / "latents", args.seed, packed.digest)
        pools.append(pool.to(device))
        scale = round(1 / pools[0][0, ::7].float().std().item(), 5)
        (args.folder / "measured.json").write_text(json.dumps({**measured, "scaling factor": scale}))
        sampler = denoiser_stage.Sampler(pools, scale, ids, empty, args.batch, device)
        trained = denoiser_stage.train(
            setting, stage, sampler, tokens, getattr(args, stage), args.lr, weights, args.unet_widths
        )
        weights = dict(trained.named_parameters())


def export(args: argparse.Namespace) -> None:
    """Write the diffusers folder of the weights that were trained here or brought back."""
    tensors, facts = collect(args)
    if not tensors:
        raise SystemExit(f"{args.folder} holds no weights; train first.")
    state.check(args.folder, facts, {"VAE widths": list(args.vae_widths), "U-Net widths": list(args.unet_widths)})
    tokens = CLIPTokenizer.from_pretrained(args.pack / "tokenizer")
    vae, denoiser = model.vae(args.vae_widths), model.denoiser(tokens, args.unet_widths)
    for name, network in (("vae", vae), ("denoiser", denoiser)):
        state_dict = {key: value.float() for key, value in (part(tensors, name) or {}).items()}
        if dict(network.named_parameters()).keys() != state_dict.keys():
            raise SystemExit(f"{args.folder / 'weights'} has not all of the {name}; train every stage first.")
        network.load_state_dict(state_dict, strict=False)  # what is left are buffers of positions
    vae.register_to_config(scaling_factor=facts["scaling factor"])
    model.export(vae, denoiser, args.pack / "tokenizer", args.export)


if __name__ == "__main__":
    arguments = options()
    (export if arguments.export else collect if arguments.collect else train)(arguments)
