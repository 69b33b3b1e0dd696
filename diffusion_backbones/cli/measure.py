"""The verbs that measure a backbone: ``bench`` and ``compare``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone, find_device
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import CENTRAL_SQUARE, EXISTING, ModelOptions, Name
from diffusion_backbones.cli.table import print_table


@click.command()
@click.argument("name", type=Name())
@options.device()
@options.dtype(help="Dtype of weights and maps.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images in a call.")
@options.size(type=click.IntRange(min=64), help="Side of the square images.  [default: the backbone's own]")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often each way is timed, in turn."
)
@options.encoder()
@click.option("--fold", is_flag=True, help="Drop the weights of what is constant, as create_model(fold=True) does.")
@click.option(
    "--compile",
    is_flag=False,
    flag_value="freeze",
    metavar="[MODE]",
    help="Also time it as create_model(compile=MODE) builds it.  [MODE: freeze]",
)
@click.option(
    "--load", is_flag=True, help="Also write the weights to a temporary folder and load them, for seconds and memory."
)
@options.table(help="Append the rows to this file.")
@options.json_output()
def bench(
    name: str,
    device: str,
    dtype: str,
    batch: int,
    size: int | None,
    rounds: int,
    load: bool,
    table: Path | None,
    as_json: bool,
    **build: Any,
) -> None:
    """Measure how fast a backbone is here, and how much memory it takes.

    Also timed in the same run: the usual ways to get the same features. These are the whole pipeline in memory, with
    the whole network read by hooks, and for ensembles an encode for each noise draw. Weights are random, so nothing is
    downloaded. One line each: milliseconds an image, images a second, times as fast as hooks, operations, share of what
    a large matrix product reaches on this device; with --load also seconds until the weights are in memory, and the
    most memory in use until it ran once.

    \b
    Examples:
      diffusion-backbones bench tinysd_gdf
      diffusion-backbones bench sd15_gdf --encoder tiny --rounds 2
      diffusion-backbones bench sd15_gdf --device cuda --dtype bfloat16 --batch 8 --load --csv speed.csv
    """
    with loading(name):
        from diffusion_backbones.evaluation import benchmark, benchmark_table, csv_table  # torch
        from diffusion_backbones.surgery.compilation import check_compile  # torch

    chosen, where = {key: value for key, value in build.items() if value}, find_device(device)
    setting = benchmark.Setting(name, str(where), dtype, batch, size, rounds, load, chosen)
    with options.wrong("--compile"):
        check_compile(chosen.get("compile", False), where)
    with options.wrong("--csv"):
        csv_table.check(table, benchmark_table.COLUMNS)
    before = benchmark.matmul_gflops(setting.device, dtype)
    try:
        timings = benchmark.bench(setting, say=lambda text: click.echo(text, err=True))
    except OSError as error:
        raise click.ClickException(str(error)) from error
    product = max(before, benchmark.matmul_gflops(setting.device, dtype))  # a machine is slower at times
    found = benchmark_table.rows(timings, setting, product)
    if table:
        benchmark_table.write(found, table)
    told = f"{setting.side} x {setting.side} pixels, batch {batch}, {dtype}, {found[0]['hardware']}"
    if call := timings[0].parts.get("call"):
        encoding, denoising = (timings[0].parts[part] / call for part in ("encoder", "denoiser"))
        told = (
            f"of the time: image encoder {encoding:.1%}, denoiser {denoising:.1%}, the rest "
            f"{1 - encoding - denoising:.1%}\n{told}"
        )
    head = ["way", "ms/image", "images/s", "speed", "GFLOPs", "of matmul", "loaded in s", "GB"]
    print_table(head, [_cells(row, batch) for row in found], found if as_json else None, told)


def _cells(row: Mapping[str, Any], batch: int) -> list[str]:
    """A row of the benchmark as it is printed."""
    gigabytes = row["peak_bytes"] and row["peak_bytes"] / 1e9
    others = {"gflops": 0, "share_of_matmul": 2, "load_seconds": 2}
    optional = [*((row[name], digits) for name, digits in others.items()), (gigabytes, 2)]
    return [
        row["way"],
        f"{1000 * row['seconds'] / batch:,.0f}",
        f"{batch / row['seconds']:.3g}",
        f"{row['speed']:.2f}x",
        *("-" if value is None else f"{value:,.{digits}f}" for value, digits in optional),
    ]


@click.command()
@click.argument("name", type=Name(places=True))
@click.argument("images", nargs=-1, type=EXISTING)
@options.size(help=CENTRAL_SQUARE)
@options.model_options()
@options.max_pixels()
@options.table(help="Write the rows to this file, in place of those of the same backbone.")
@options.json_output()
def compare(
    name: str,
    images: Sequence[Path],
    size: int | None,
    max_pixels: int | None,
    model: ModelOptions,
    table: Path | None,
    as_json: bool,
) -> None:
    """Measure how far the features with --encoder tiny are from the exact ones.

    IMAGES are files and folders; without any they are the new drawn scenes of the evaluation set in the package. One
    line each for the latents and every level: channels, stride, relative error (the norm of the difference as a share
    of the norm), and the mean cosine similarity of the features at a place.

    \b
    Examples:
      diffusion-backbones compare tinysd_gdf --encoder tiny
      diffusion-backbones compare sd15_gdf photos/ --encoder tiny --size 512
    """
    from diffusion_backbones.extraction import images as files  # Pillow

    if model.encoder is None:
        raise click.UsageError("--encoder tiny is missing; compare needs the encoder that deviates from the exact one.")
    model.check(name)
    photos = [file.path for file in files.find(images)]

    with loading(name):
        from diffusion_backbones.evaluation import csv_table, deviation  # torch
        from diffusion_backbones.evaluation.scenes import load_scenes

    with options.wrong("--csv"):
        csv_table.check(table, ["backbone", "encoder", "images", "command", *deviation.COLUMNS])

    exact, other = (build_backbone(name, replace(model, encoder=which)) for which in (None, model.encoder))
    prepare = files.transform(exact.pretrained_cfg, size)
    scenes = () if photos else load_scenes().scenes
    pictures, count = (
        chain((files.load(photo, max_pixels) for photo in photos), (scene.image for scene in scenes)),
        len(photos) + len(scenes),
    )
    found = deviation.deviations(exact, other, (prepare(picture)[None].to(exact.device) for picture in pictures))
    if table:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"backbone": exact.declaration.name, "encoder": model.encoder, "images": count}
        deviation.write(found, table, **about, command=command)
    rows = [[row.level, str(row.channels), str(row.stride), f"{row.error:.4f}", f"{row.cosine:.4f}"] for row in found]
    head = ["level", "channels", "stride", "relative error", "cosine"]
    print_table(head, rows, [asdict(row) for row in found] if as_json else None, f"{count} images")
