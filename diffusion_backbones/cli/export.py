"""``diffusion-backbones export``: a backbone as one file."""

from __future__ import annotations

from pathlib import Path

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import NEW_FILE, ModelOptions, Name


@click.command()
@click.argument("name", type=Name(places=True))
@click.option("-o", "--out", required=True, type=NEW_FILE, help="The file: .pt2 for PyTorch, .onnx for ONNX.")
@options.size(nargs=2, metavar="H W", help="Height and width of the images in pixels.  [default: the backbone's own]")
@click.option(
    "--dynamic", is_flag=True, help="Any height and width that are multiples of the backbone's, in place of one size."
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Images in a call.  [default: any number]")
@click.option(
    "--program",
    is_flag=True,
    help="Write the exported program itself to the .pt2, not compiled: slower, but not for one kind of machine.",
)
@options.model_options(with_encoder=False)
@options.dtype(help="What the file computes in, except on the CPU, which computes in float32.")
@options.overwrite(help="Replace an existing file.")
def export(
    name: str,
    out: Path,
    size: tuple[int, int] | None,
    dynamic: bool,
    batch: int | None,
    program: bool,
    model: ModelOptions,
    dtype: str,
    overwrite: bool,
) -> None:
    """Export a backbone to one file that runs without this package.

    A .pt2 is compiled for the kind of machine that --device is on and this version of PyTorch, where
    torch._inductor.aoti_load_package(FILE) reads it; with --program, torch.export.load(FILE) does, on any machine. The
    file fixes weights, levels, prompt, timestep, noise and, without --dynamic, the size. It does not check images. NAME
    is a backbone, hf-hub:OWNER/REPO or local-dir:FOLDER. Prints what the file contains, and its path last.

    \b
    Examples:
      diffusion-backbones export tinysd_gdf -o tinysd.pt2
      diffusion-backbones export sd15_gdf -o backbone.pt2 --size 512 768 --batch 1
      diffusion-backbones export sd15_gdf -o backbone.onnx --dynamic
    """
    if size and dynamic:
        raise click.UsageError("--size fixes what --dynamic leaves open; give one of them.")
    model.check(name)

    with loading(name):
        from diffusion_backbones.factory import export  # torch

    try:
        export.check_path(out, not program, overwrite)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    backbone = build_backbone(name, model, dtype)
    data = export.export(
        backbone, out, size=size, batch=batch, dynamic=dynamic, compiled=not program, overwrite=overwrite
    )
    for key, value in data.items():
        click.echo(f"{key:10}{value}")
    click.echo(out)
