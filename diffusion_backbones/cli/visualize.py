"""``diffusion-backbones visualize``: images beside their features."""

from __future__ import annotations

from pathlib import Path

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import CENTRAL_SQUARE, EXISTING_FILE, NEW_FILE, ModelOptions, Name, argument_of
from diffusion_backbones.ops import atomic
from diffusion_backbones.spec import registry

DEFAULT = "tinysd_gdf"


@click.command()
@click.argument("name", metavar="[NAME]")
@click.argument("image", metavar="IMAGE", required=False)
@click.argument("more", metavar="[IMAGE]...", nargs=-1)
@click.option("-o", "--out", required=True, type=NEW_FILE, help="The picture: .png, .jpg or .webp.")
@options.size(help=CENTRAL_SQUARE)
@options.max_pixels()
@click.option(
    "--hide-background",
    is_flag=True,
    help="Leave white what the first component and the images' borders say is background.",
)
@options.model_options()
@click.pass_context
def visualize(
    context: click.Context,
    name: str,
    image: str | None,
    more: tuple[str, ...],
    out: Path,
    size: int | None,
    max_pixels: int | None,
    hide_background: bool,
    model: ModelOptions,
) -> None:
    """Draw images and every level of their pyramids, an image a column, or one image beside its levels.

    The channels of a level become red, green and blue by principal component analysis of all images together, so that
    like things have like colors in all of them. The level of stride 16, or the nearest to it, comes first. NAME is a
    backbone, hf-hub:OWNER/REPO or local-dir:FOLDER; without it, it is tinysd_gdf, which needs no download. Prints the
    shape of every level, and the picture's path last.

    \b
    Examples:
      diffusion-backbones visualize photo.jpg -o picture.png
      diffusion-backbones visualize sd15_gdf photo.jpg -o picture.png
      diffusion-backbones visualize cow.jpg camel.jpg goat.jpg -o picture.png --size 256 --hide-background
      diffusion-backbones visualize tinysd_genpercept photo.jpg -o picture.png --size 512
    """
    from diffusion_backbones.extraction.images import load, too_large  # Pillow

    given = [name, *([] if image is None else [image]), *more]
    if image is None or _is_image(name):
        name = DEFAULT
    else:
        del given[0]
    paths: list[Path] = [EXISTING_FILE.convert(path, argument_of(context, "image"), context) for path in given]
    name = Name(places=True, fusions=True).convert(name, argument_of(context, "name"), context)
    atomic.check_output(out, paths)
    images = [load(path, max_pixels) for path in paths]
    model.check(name)

    with loading(name):
        from diffusion_backbones.evaluation import visualize  # torch

    if out.suffix.lower() not in visualize.FORMATS:
        raise click.BadParameter(f"{out.name!r} must end in one of {', '.join(visualize.FORMATS)}.", param_hint="'-o'")
    atomic.check_writable(out)
    backbone = build_backbone(name, model)
    declaration = backbone.declaration
    if size is None:
        for path, loaded in zip(paths, images, strict=True):
            if advice := too_large(path, loaded, declaration):
                click.echo(advice, err=True)
    panels, seen = zip(*(visualize.panels(backbone, loaded, size, model.levels) for loaded in images), strict=True)
    warning = visualize.UNTRAINED if model.random_weights else ""
    title, about = visualize.titles(declaration)
    visualize.write(visualize.sheet(seen, panels, title, about, warning, hide_background), out)
    for path, row in zip(paths, panels, strict=True):
        for panel in row:
            which = f"{path}: " if len(paths) > 1 else ""
            click.echo(f"{which}{panel.name}: {tuple(panel.features.shape)} @ stride {panel.stride}")
    click.echo(out)


def _is_image(first: str) -> bool:
    """Whether the first of several arguments is an image: one that is there, or ends like one, and no backbone."""
    from diffusion_backbones.extraction.images import SUFFIXES  # Pillow

    return not registry.is_model(first) and (Path(first).is_file() or Path(first).suffix.lower() in SUFFIXES)
