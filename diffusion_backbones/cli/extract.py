"""``diffusion-backbones extract``: folders of images to features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import build_backbone, random_provenance
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import CENTRAL_SQUARE, EXISTING, OUTPUT, ModelOptions, Name


@click.command()
@click.argument("name", type=Name(places=True, fusions=True))
@click.argument("images", nargs=-1, required=True, type=EXISTING)
@click.option("-o", "--out", required=True, type=OUTPUT, help="Folder for the features.")
@options.size(help=CENTRAL_SQUARE)
@options.model_options()
@options.dtype(
    default="float16",
    help="What the files hold, and what the network computes in except on the CPU, which computes in float32.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Images per pass; only neighbours of equal size share one.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Threads that read images while others are computed and written; 0 does one thing after another.  [default: "
    "0 on the CPU, up to 8 for a GPU]",
)
@options.max_pixels()
@options.overwrite(help="Make everything again, even where other settings made it.")
def extract(
    name: str,
    images: Sequence[Path],
    out: Path,
    size: int | None,
    model: ModelOptions,
    dtype: str,
    batch_size: int,
    workers: int | None,
    max_pixels: int | None,
    overwrite: bool,
) -> None:
    """Extract the features of whole folders, one file per image.

    NAME is a backbone, a fusion such as sdxl_gdf+vit_base_patch14_dinov2, hf-hub:OWNER/REPO or local-dir:FOLDER.
    IMAGES are files and folders; folders are searched recursively. The features of a/b.jpg in the folder photos go to
    OUT/a/b.jpg.safetensors, with the tensors level0 (C, h, w), level1 and so on; OUT/manifest.json says how they were
    made, and its path is printed. Run it again to resume: what is finished stays, images that changed are made again.
    Several processes may share OUT.

    \b
    Examples:
      diffusion-backbones extract sd15_gdf photos/ -o features/
      diffusion-backbones extract sdxl_gdf photos/ -o features/ --size 1024 --batch-size 4 --device cuda
      diffusion-backbones extract sd15_gdf a.jpg b.png -o features/ --levels 0 --prompt 'a photo of a cat'
    """
    from diffusion_backbones.extraction import images as image_files  # Pillow
    from diffusion_backbones.extraction.rerun import Order, all_finished

    files = image_files.find(images)
    model.check(name)
    order = Order(name, {**asdict(model), "size": size, "dtype": dtype})
    if not overwrite and all_finished(order, files, out):
        _tell(out, skipped=len(files))
        return

    with loading(name):
        import torch

        from diffusion_backbones.extraction.run import extract as write_features  # torch

    backbone = build_backbone(name, model, dtype)
    try:
        summary = write_features(
            backbone,
            files,
            out,
            size=size,
            dtype=getattr(torch, dtype),
            batch_size=batch_size,
            workers=workers,
            names=[f"level{i}" for i in model.levels] if model.levels else None,
            weights=random_provenance(model, backbone),
            overwrite=overwrite,
            max_pixels=max_pixels,
            order=order.note(backbone.provenance),
        )
    except KeyboardInterrupt:
        without = ", without --overwrite," if overwrite else ""
        click.echo(f"\nInterrupted. Finished images are kept: the same command{without} goes on from here.", err=True)
        raise click.exceptions.Exit(130) from None
    _tell(out, summary.done, summary.skipped, len(summary.failed))
    if summary.failed:
        raise click.exceptions.Exit(1)


def _tell(out: Path, done: int = 0, skipped: int = 0, failed: int = 0) -> None:
    """Say what became of the images, and print the manifest's path."""
    from diffusion_backbones.extraction import MANIFEST  # Pillow

    click.echo(f"{done} extracted, {skipped} finished before, {failed} failed", err=True)
    click.echo(out / MANIFEST)
