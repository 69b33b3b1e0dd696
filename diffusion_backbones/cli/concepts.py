"""``diffusion-backbones concepts``: where words are in a photograph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import CENTRAL_SQUARE, EXISTING_FILE, NEW_FILE, ModelOptions, Name
from diffusion_backbones.ops import atomic


@click.command()
@click.argument("name", type=Name(places=True))
@click.argument("image", type=EXISTING_FILE)
@click.argument("words", metavar="WORD...", nargs=-1, required=True)
@click.option("-o", "--out", required=True, type=NEW_FILE, help="The picture: .png, .jpg or .webp.")
@options.size(help=CENTRAL_SQUARE)
@options.max_pixels()
@options.model_options()
def concepts(
    name: str,
    image: Path,
    words: tuple[str, ...],
    out: Path,
    size: int | None,
    max_pixels: int | None,
    model: ModelOptions,
) -> None:
    """Draw a photograph beside a map for every word, by the attention of the network to its prompt.

    The words are the prompt, or stand in place of the {} of --prompt, or are in it. NAME is a backbone whose network
    takes a prompt; its whole network is loaded, with its text encoders. Prints the words, and the picture's path last.

    \b
    Examples:
      diffusion-backbones concepts sd15_gdf photo.jpg cat sky -o picture.png
      diffusion-backbones concepts sdxl_gdf photo.jpg cat "green grass" -o picture.png --size 1024
      diffusion-backbones concepts sd3_medium_seg4diff photo.jpg cat -o picture.png --prompt "a photo of a {}"
    """
    from diffusion_backbones.extraction.images import load  # Pillow

    atomic.check_output(out, [image])
    photo = load(image, max_pixels)
    model.check(name)
    with loading(name):
        from diffusion_backbones.evaluation import concepts, visualize  # torch

    if out.suffix.lower() not in visualize.FORMATS:
        raise click.BadParameter(f"{out.name!r} must end in one of {', '.join(visualize.FORMATS)}.", param_hint="'-o'")
    atomic.check_writable(out)
    backbone = build_backbone(name, replace(model, prompt=None), truncate=False)
    panels, seen = concepts.panels(backbone, photo, words, model.prompt, size)
    visualize.write(visualize.picture(seen, panels, *visualize.titles(backbone.declaration)), out)
    for word in words:
        click.echo(word)
    click.echo(out)
