"""``diffusion-backbones visualize``: a photograph beside its features."""

from __future__ import annotations

from pathlib import Path

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone
from diffusion_backbones.cli.options import CENTRAL_SQUARE, EXISTING_FILE, NEW_FILE, ModelOptions, Name, argument_of
from diffusion_backbones.ops import atomic


@click.command()
@click.argument("name", metavar="[NAME]")
@click.argument("image", metavar="IMAGE", required=False)
@click.option("-o", "--out", required=True, type=NEW_FILE, help="The picture: .png, .jpg or .webp.")
@options.size(help=CENTRAL_SQUARE)
@options.max_pixels()
@options.model_options()
@click.pass_context
def visualize(
    context: click.Context,
    name: str,
    image: str | None,
    out: Path,
    size: int | None,
    max_pixels: int | None,
    model: ModelOptions,
) -> None:
    """Draw a photograph beside every level of its pyramid.

    The channels of a level become red, green and blue by principal component analysis. NAME is a backbone,
    hf-hub:OWNER/REPO or local-dir:FOLDER; without it, it is tinysd_gdf, which needs no download. Prints the shape of
    every level, and the picture's path last.

    \b
    Examples:
      diffusion-backbones visualize photo.jpg -o picture.png
      diffusion-backbones visualize sd15_gdf photo.jpg -o picture.png
      diffusion-backbones visualize tinysd_genpercept photo.jpg -o picture.png --size 512
    """
    from diffusion_backbones.extraction.images import load, too_large  # torch

    if image is None:
        name, image = "tinysd_gdf", name
    path: Path = EXISTING_FILE.convert(image, argument_of(context, "image"), context)
    name = Name(places=True, fusions=True).convert(name, argument_of(context, "name"), context)
    atomic.check_output(out, [path])
    photo = load(path, max_pixels)
    model.check(name)

    from diffusion_backbones.evaluation import visualize  # torch

    if out.suffix.lower() not in visualize.FORMATS:
        raise click.BadParameter(f"{out.name!r} must end in one of {', '.join(visualize.FORMATS)}.", param_hint="'-o'")
    atomic.check_writable(out)
    backbone = build_backbone(name, model)
    declaration = backbone.declaration
    if size is None and (advice := too_large(path, photo, declaration)):
        click.echo(advice, err=True)
    panels, seen = visualize.panels(backbone, photo, size, model.levels)
    warning = visualize.UNTRAINED if model.random_weights else ""
    visualize.write(visualize.picture(seen, panels, *visualize.titles(declaration), warning=warning), out)
    for panel in panels:
        click.echo(f"{panel.name}: {tuple(panel.features.shape)} @ stride {panel.stride}")
    click.echo(out)
