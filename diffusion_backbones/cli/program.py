"""``diffusion-backbones``: the command line. Data goes to stdout, everything else to stderr.

``list``, ``info``, ``activations`` and ``card`` read declarations and configs: no torch, no network, an answer at once.
Exit status: 0; 1 for failures; 2 for wrong usage, unknown names included; 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffusion_backbones._version import __version__
from diffusion_backbones.cli.export import export
from diffusion_backbones.cli.options import (
    Name,
    Program,
    _argument,
    _build,
    _check_random,
    encoder_option,
    find_device,
    model_options,
)
from diffusion_backbones.cli.select import select
from diffusion_backbones.reports import backbone_card, checkpoint_card, summary
from diffusion_backbones.spec import registry

if TYPE_CHECKING:
    pass


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="diffusion-backbones")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def main(traceback: bool) -> None:
    """timm for diffusion features: what there is, what it gives, and the features of whole folders.

    \b
    Examples:
      diffusion-backbones list 'sd15*'
      diffusion-backbones info sd15_gdf
      diffusion-backbones activations sd15 cross-q --size 512
      diffusion-backbones extract sd15_gdf photos/ -o features/ --size 512
      diffusion-backbones visualize sd15_gdf photo.jpg -o picture.png
      diffusion-backbones select tinysd -o selection/
      diffusion-backbones bench tinysd_gdf
      diffusion-backbones compare tinysd_gdf --encoder tiny
      diffusion-backbones export sd15_gdf -o backbone.pt2
      diffusion-backbones card sd15_gdf
    """


main.add_command(select)
main.add_command(export)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")


@main.command(name="list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only what has trained weights, tags included.")
@click.option("--checkpoints", is_flag=True, help="Checkpoints, not backbones: the networks that recipes read.")
@json_option
def list_(pattern: str, pretrained: bool, checkpoints: bool, as_json: bool) -> None:
    """What backbones there are.

    One line each: name, channels@stride of every level from fine to coarse, licence of the weights, and how they are
    had. PATTERN is shell-style; a word without *, ? or [ is looked for anywhere in the name.

    \b
    Examples:
      diffusion-backbones list
      diffusion-backbones list 'sd15_*'
      diffusion-backbones list gdf --json
      diffusion-backbones list --checkpoints
    """
    if checkpoints:
        known = [registry.get_checkpoint(name) for name in registry.list_checkpoints(_glob(pattern))]
        head = ["name", "licence", "access", "pixels", "weights"]
        rows = [
            [c.name, str(c.license), summary.access(c), str(c.input_size), c.hub_id or "in the package"] for c in known
        ]
        _print(head, rows, [summary.checkpoint(c) for c in known] if as_json else None, f"{len(rows)} checkpoints")
    else:
        declared = [
            registry.get_declaration(name) for name in registry.list_models(_glob(pattern), pretrained=pretrained)
        ]
        head = ["name", "channels@stride", "licence", "access"]
        rows = [
            [
                d.name,
                backbone_card.channels_at_strides(backbone_card.levels(d)),
                str(d.checkpoint.license),
                summary.access(d.checkpoint),
            ]
            for d in declared
        ]
        bare = [
            name
            for name in registry.list_checkpoints(_glob(pattern))
            if not checkpoint_card.read_by(registry.get_checkpoint(name))
        ]
        more = f"; {len(bare)} checkpoints without a published recipe match too: list --checkpoints" if bare else ""
        _print(head, rows, [summary.backbone(d) for d in declared] if as_json else None, f"{len(rows)} backbones{more}")


@main.command()
@click.argument("name", type=Name(checkpoints=True))
@json_option
def info(name: str, as_json: bool) -> None:
    """What a backbone is, what it returns and what it costs.

    NAME may be a checkpoint too: what is known of it, and what its whole network takes.

    \b
    Examples:
      diffusion-backbones info sd15_gdf
      diffusion-backbones info sd35_large
      diffusion-backbones info sdxl_gdf --json
    """
    if name in registry.list_checkpoints():
        checkpoint = registry.get_checkpoint(name)
        facts, lines = summary.facts_of_checkpoint(checkpoint), summary.about_checkpoint(checkpoint)
    else:
        declaration = registry.get_declaration(name)
        facts, lines = summary.facts(declaration), summary.about(declaration)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for heading, text in lines:
            click.echo(f"{heading:12}{text}")


@main.command()
@click.argument("name", type=Name(checkpoints=True))
@click.argument("pattern", default="*")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Add the shapes for one square image of this many pixels a side, padded as the backbone pads it.",
)
@click.option(
    "--all",
    "extensions",
    is_flag=True,
    help="Also the ids that go beyond GDF's, such as outputs of attention layers and maps of the image encoder.",
)
@json_option
def activations(name: str, pattern: str, size: int | None, extensions: bool, as_json: bool) -> None:
    """Every activation of a network.

    One line each: id, module path, port, channels, stride, and the shape with --size. NAME is a backbone or a
    checkpoint; its whole network is listed, in forward order. PATTERN is shell-style; a word without *, ? or [ is
    looked for anywhere in the id. The port is what is read of the module: its output, its input, or the attention map
    of its queries and keys, whose channels are heads.

    \b
    Examples:
      diffusion-backbones activations sd15
      diffusion-backbones activations sdxl 'up-*-cross-q' --size 1024
      diffusion-backbones activations sd15_gdf self --all --json
    """
    checkpoint = (
        registry.get_checkpoint(name)
        if name in registry.list_checkpoints()
        else registry.get_declaration(name).checkpoint
    )
    found, total = summary.activations(checkpoint, _glob(pattern), extensions, size)
    more = 0 if extensions else len(summary.activations(checkpoint, _glob(pattern), True, None)[0]) - len(found)
    count = f"{len(found)} of {total} activations of {checkpoint.name}" + (
        f"; --all adds {more} that go beyond GDF's" if more else ""
    )
    head = ["id", "path", "port", "channels", "stride", *(["shape"] if size else [])]
    rows = [[" x ".join(map(str, row[key])) if key == "shape" else str(row[key]) for key in head] for row in found]
    _print(head, rows, found if as_json else None, count)


@main.command()
@click.argument("name", type=Name(checkpoints=True))
def card(name: str) -> None:
    """The card of a backbone or a checkpoint, in Markdown.

    \b
    Examples:
      diffusion-backbones card sd15_gdf > README.md
      diffusion-backbones card sd35_large
    """
    known = name in registry.list_checkpoints()
    text = (
        checkpoint_card.card(registry.get_checkpoint(name))
        if known
        else backbone_card.card(registry.get_declaration(name))
    )
    click.echo(text, nl=False)


@main.command()
@click.argument("name", type=Name(places=True))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the features.")
@model_options
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the files, and of the computation except on the CPU, which computes in float32.",
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
@click.option("--overwrite", is_flag=True, help="Make everything again, even where other settings made it.")
def extract(
    name: str,
    images: Sequence[Path],
    out: Path,
    size: int | None,
    levels: tuple[int, ...] | None,
    dtype: str,
    batch_size: int,
    workers: int | None,
    overwrite: bool,
    **model: Any,
) -> None:
    """Features of whole folders, a file for each image.

    NAME is a backbone, hf-hub:OWNER/REPO or local-dir:FOLDER. IMAGES are files and folders, which are read with all
    that is below them. The features of a/b.jpg in the folder photos go to OUT/a/b.jpg.safetensors, with the tensors
    level0 (C, h, w), level1 and so on; OUT/manifest.json says how they were made, and its path is printed. Calling it
    again goes on where it stopped.

    \b
    Examples:
      diffusion-backbones extract sd15_gdf photos/ -o features/
      diffusion-backbones extract sdxl_gdf photos/ -o features/ --size 1024 --batch-size 4 --device cuda
      diffusion-backbones extract sd15_gdf a.jpg b.png -o features/ --levels 0 --prompt 'a photo of a cat'
    """
    from diffusion_backbones.extraction.images import find

    files = find(images)
    _check_random(name, model)

    import torch

    from diffusion_backbones import extraction

    built = _build(name, levels, dtype, **model)
    names = [f"level{i}" for i in levels] if levels else None
    try:
        summary = extraction.extract(
            built.backbone,
            files,
            out,
            size=size,
            dtype=getattr(torch, dtype),
            batch_size=batch_size,
            workers=workers,
            names=names,
            weights=built.weights,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        without = ", without --overwrite," if overwrite else ""
        click.echo(f"\nInterrupted. Finished images are kept: the same command{without} goes on from here.", err=True)
        raise click.exceptions.Exit(130) from None
    click.echo(f"{summary.done} extracted, {summary.skipped} finished before, {len(summary.failed)} failed", err=True)
    click.echo(out / extraction.MANIFEST)
    if summary.failed:
        raise click.exceptions.Exit(1)


PHOTO = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.command()
@click.argument("name", metavar="[NAME]")
@click.argument("image", metavar="IMAGE", required=False)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture: .png, .jpg or .webp.",
)
@click.pass_context
@model_options
def visualize(
    context: click.Context,
    name: str,
    image: str | None,
    out: Path,
    size: int | None,
    levels: tuple[int, ...] | None,
    **model: Any,
) -> None:
    """A photograph beside what each level sees in it.

    The channels of a level become red, green and blue by principal component analysis. NAME is a backbone,
    hf-hub:OWNER/REPO or local-dir:FOLDER; without it, it is tinysd_gdf, which needs no download. Prints the shape of
    every level, and the picture's path last.

    \b
    Examples:
      diffusion-backbones visualize photo.jpg -o picture.png
      diffusion-backbones visualize sd15_gdf photo.jpg -o picture.png
      diffusion-backbones visualize tinysd_genpercept photo.jpg -o picture.png --size 512
    """
    from diffusion_backbones.extraction.images import load, too_large

    if image is None:
        name, image = "tinysd_gdf", name
    path: Path = PHOTO.convert(image, _argument(context, "image"), context)
    name = Name(places=True).convert(name, _argument(context, "name"), context)
    photo = load(path)
    _check_random(name, model)

    from diffusion_backbones.evaluation import visualize

    if out.suffix.lower() not in visualize.FORMATS:
        raise click.BadParameter(f"{out.name!r} ends in none of {', '.join(visualize.FORMATS)}.", param_hint="'-o'")
    built = _build(name, levels, None, **model)
    declaration = built.backbone.declaration
    if size is None and (advice := too_large(path, photo, declaration)):
        click.echo(advice, err=True)
    panels, seen = visualize.panels(built.backbone, photo, size, levels)
    visualize.write(
        visualize.picture(
            seen, panels, *visualize.titles(declaration), warning=visualize.UNTRAINED if built.weights else ""
        ),
        out,
    )
    for panel in panels:
        click.echo(f"{panel.name}: {tuple(panel.features.shape)} @ stride {panel.stride}")
    click.echo(out)


@main.command()
@click.argument("name", type=Name())
@click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights and maps.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images in a call.")
@click.option(
    "--size",
    type=click.IntRange(min=64),
    metavar="PIXELS",
    help="Side of the square images.  [default: the backbone's own]",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often each way is timed, in turn."
)
@encoder_option
@click.option("--fold", is_flag=True, help="Without the weights of what is constant, as create_model(fold=True) does.")
@click.option(
    "--compile",
    is_flag=False,
    flag_value="freeze",
    metavar="[MODE]",
    help="Time it as create_model(compile=MODE) too, and as it is.  [MODE: freeze]",
)
@click.option(
    "--load", is_flag=True, help="Also write the weights to a temporary folder and load them, for seconds and memory."
)
@click.option(
    "--csv", "table", type=click.Path(dir_okay=False, path_type=Path), help="Append what was measured to this file."
)
@json_option
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
    **options: Any,
) -> None:
    """How fast a backbone is here, and how much memory it takes.

    Beside it stand, in the same run, the usual ways to the same features: the whole pipeline in memory and the whole
    network read with hooks, and for ensembles an encode for each noise draw. With random weights, so nothing is
    downloaded. One line each: milliseconds an image, images a second, times as fast as hooks, operations, share of what
    a large matrix product reaches on this device; with --load seconds until the weights are in memory, and the most
    memory in use until it ran once.

    \b
    Examples:
      diffusion-backbones bench tinysd_gdf
      diffusion-backbones bench sd15_gdf --encoder tiny --rounds 2
      diffusion-backbones bench sd15_gdf --device cuda --dtype bfloat16 --batch 8 --load --csv speed.csv
    """
    from diffusion_backbones.evaluation import benchmark

    chosen = {key: value for key, value in options.items() if value}
    setting = benchmark.Setting(name, str(find_device(device)), dtype, batch, size, rounds, load, chosen)
    before = benchmark.matmul_gflops(setting.device, dtype)
    try:
        timings = benchmark.bench(setting, say=lambda text: click.echo(text, err=True))
    except OSError as error:
        raise click.ClickException(str(error)) from error
    found = benchmark.rows(
        timings, setting, max(before, benchmark.matmul_gflops(setting.device, dtype))
    )  # a machine is slower at times
    if table:
        benchmark.write(found, table)

    def cells(row: Mapping[str, Any]) -> list[str]:
        gigabytes = row["peak_bytes"] and row["peak_bytes"] / 1e9
        others = (row["gflops"], row["share_of_matmul"], row["load_seconds"], gigabytes)
        speed = [f"{1000 * row['seconds'] / batch:,.0f}", f"{batch / row['seconds']:.3g}", f"{row['speed']:.2f}x"]
        return [
            row["way"],
            *speed,
            *(
                "-" if value is None else f"{value:,.{digits}f}"
                for value, digits in zip(others, (0, 2, 2, 2), strict=True)
            ),
        ]

    where = f"{setting.side} x {setting.side} pixels, batch {batch}, {dtype}, {found[0]['hardware']}"
    if call := timings[0].parts.get("call"):
        encoding, denoising = (timings[0].parts[part] / call for part in ("encoder", "denoiser"))
        where = (
            f"of the time: image encoder {encoding:.1%}, denoiser {denoising:.1%}, the rest "
            f"{1 - encoding - denoising:.1%}\n{where}"
        )
    head = ["way", "ms/image", "images/s", "speed", "GFLOPs", "of matmul", "loaded in s", "GB"]
    _print(head, [cells(row) for row in found], found if as_json else None, where)


@main.command()
@click.argument("name", type=Name(places=True))
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
@model_options
@click.option(
    "--csv",
    "table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rows into this file, in place of those of the same backbone.",
)
@json_option
def compare(
    name: str,
    images: Sequence[Path],
    size: int | None,
    levels: tuple[int, ...] | None,
    encoder: str | None,
    table: Path | None,
    as_json: bool,
    **model: Any,
) -> None:
    """How far the features with --encoder tiny are from the exact ones.

    IMAGES are files and folders; without any they are the new drawn scenes of the evaluation set in the package. One
    line each for the latents and every level: channels, stride, relative error (the norm of the difference as a share
    of the norm), and the mean cosine similarity of the features at a place.

    \b
    Examples:
      diffusion-backbones compare tinysd_gdf --encoder tiny
      diffusion-backbones compare sd15_gdf photos/ --encoder tiny --size 512
    """
    from diffusion_backbones.extraction import images as files

    if encoder is None:
        raise click.UsageError("say what is compared with the exact features: --encoder tiny.")
    _check_random(name, model)
    photos = [file.path for file in files.find(images)]

    from diffusion_backbones.evaluation import deviation
    from diffusion_backbones.evaluation.scenes import load_scenes

    exact, other = (_build(name, levels, None, encoder=which, **model).backbone for which in (None, encoder))
    prepare = files.transform(exact.pretrained_cfg, size)
    device = next(exact.denoiser.parameters()).device
    pictures = map(files.load, photos) if photos else [scene.image for scene in load_scenes().scenes]
    count = len(photos) or len(load_scenes().scenes)
    found = deviation.deviations(exact, other, (prepare(picture)[None].to(device) for picture in pictures))
    if table:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        deviation.write(found, table, backbone=exact.declaration.name, encoder=encoder, images=count, command=command)
    rows = [[row.level, str(row.channels), str(row.stride), f"{row.error:.4f}", f"{row.cosine:.4f}"] for row in found]
    _print(
        ["level", "channels", "stride", "relative error", "cosine"],
        rows,
        [asdict(row) for row in found] if as_json else None,
        f"{count} images",
    )


def _glob(pattern: str) -> str:
    return pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"


def _print(head: Sequence[str], rows: Sequence[Sequence[str]], data: Sequence[Any] | None, count: str) -> None:
    """Rows in columns, or ``data`` as JSON. Heading and count go to stderr, so that stdout has one line for each row."""
    if data is None:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        click.secho(_line(head, widths), err=True, dim=True)
        for row in rows:
            click.echo(_line(row, widths))
    else:
        click.echo(json.dumps(data, indent=2))
    click.echo(count, err=True)


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
