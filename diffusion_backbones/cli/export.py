"""``diffusion-backbones export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("name")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file: .pt2 for PyTorch, .onnx for ONNX.",
)
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=1),
    metavar="H W",
    help="Of the images in pixels.  [default: the backbone's own]",
)
@click.option(
    "--dynamic", is_flag=True, help="Any height and width that are multiples of the backbone's, in place of one size."
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Images in a call.  [default: any number]")
@click.option(
    "--program",
    is_flag=True,
    help="A .pt2 with the exported program itself, not compiled: slower, and not for one kind of machine.",
)
@click.option("--levels", metavar="LEVELS", help="Only these, 0 being the finest: 0,2.  [default: all]")
@click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="Where the file is to run: cpu, cuda, cuda:1, mps ...",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float32",
    show_default=True,
    help="Except on the CPU, which computes in float32.",
)
@click.option(
    "--checkpoint-path",
    type=PATH,
    help="A diffusers folder, a saved backbone or a .safetensors file, not the published weights.",
)
@click.option("--random-weights", is_flag=True, help="Random weights (seed 0), to try things without a download.")
@click.option("--prompt", help="In place of the recipe's.")
@click.option("--timestep", type=int, help="In place of the recipe's.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@click.pass_context
def export(
    context: click.Context,
    /,
    name: str,
    out: Path,
    size: tuple[int, int] | None,
    dynamic: bool,
    batch: int | None,
    program: bool,
    levels: str | None,
    dtype: str,
    overwrite: bool,
    **model: Any,
) -> None:
    """A backbone as one file that runs without this package.

    A .pt2 is compiled for this kind of machine and this version of PyTorch, where
    torch._inductor.aoti_load_package(FILE) reads it; with --program, torch.export.load(FILE) does, on any machine. What
    stands in the file is fixed: weights, levels, prompt, timestep, noise and, without --dynamic, the size. Images are
    not checked. NAME is a backbone, hf-hub:OWNER/REPO or local-dir:FOLDER. Prints what the file says of itself, and its
    path last.

    \b
    Examples:
      diffusion-backbones export tinysd_gdf -o tinysd.pt2
      diffusion-backbones export sd15_gdf -o backbone.pt2 --size 512 768 --batch 1
      diffusion-backbones export sd15_gdf -o backbone.onnx --dynamic
    """
    from diffusion_backbones.cli import options as cli

    arguments = {parameter.name: parameter for parameter in context.command.params}
    name = cli.Name(places=True).convert(name, arguments["name"], context)
    chosen = cli.Levels().convert(levels, arguments["levels"], context) if levels else None
    if size and dynamic:
        raise click.UsageError("--size fixes what --dynamic leaves open; give one of them.")
    cli._check_random(name, model)

    from diffusion_backbones.factory import export

    try:
        export.check_path(out, not program, overwrite)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    built = cli._build(name, chosen, dtype, **model)
    data = export.export(
        built.backbone, out, size=size, batch=batch, dynamic=dynamic, compiled=not program, overwrite=overwrite
    )
    for key, value in data.items():
        click.echo(f"{key:10}{value}")
    click.echo(out)
