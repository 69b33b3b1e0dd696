"""``diffusion-backbones select``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from diffusion_backbones.selection import paper
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.validation import closest


class Checkpoint(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases of click
    """A checkpoint's name, or a diffusers folder."""

    name = "checkpoint"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = registry.list_checkpoints()
        if value in known:
            return value
        if Path(value).is_dir():
            return f"local-dir:{value}"
        self.fail(
            f"there is no checkpoint {value!r}, and no folder.{closest(value, known)} `diffusion-backbones list "
            "--checkpoints` lists them.",
            param,
            ctx,
        )


def _paper(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(paper.text())
        ctx.exit()


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("checkpoint", type=Checkpoint())
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for all that comes of it.",
)
@click.option("--images", type=FOLDER, help="A few dozen of your images.  [default: the drawn scenes in the package]")
@click.option("--masks", type=FOLDER, help="A .png of class numbers for every image: compare on segmentation.")
@click.option("--keypoints", type=FILE, help="A JSON list of matched points: compare on correspondence.")
@click.option(
    "--task",
    type=click.Choice(["masks", "keypoints", "warps"]),
    help="Which of the package's own tasks, without --images.  [default: masks]",
)
@click.option(
    "--size",
    type=click.IntRange(min=64),
    metavar="PIXELS",
    help="Side of the squares that images become.  [default: the checkpoint's]",
)
@click.option("--timestep", type=float, default=50, show_default=True, help="At which the network is read.")
@click.option("--prompt", metavar="TEXT", help="What the network is told.  [default: nothing]")
@click.option(
    "--ids",
    multiple=True,
    default=("*",),
    metavar="PATTERN",
    help="Look at these activations alone, such as 'up-*'; may be given again.",
)
@click.option(
    "--rules", type=FILE, help="A YAML file of rules in place of the paper's; one that holds [] drops nothing."
)
@click.option("--everything", is_flag=True, help="Compare also what the rules drop, to see what they cost.")
@click.option(
    "--draws",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Noise draws for each image that properties are measured on.",
)
@click.option("--max-channels", type=click.IntRange(min=1), help="Of the whole pyramid.")
@click.option(
    "--max-gflops",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the denoiser up to the last activation, for one image.",
)
@click.option(
    "--members", type=click.IntRange(min=1), default=6, show_default=True, help="Activations in the recipe, at most."
)
@click.option(
    "--checkpoint-path",
    type=click.Path(exists=True, path_type=Path),
    help="A diffusers folder or a .safetensors file, not the published weights.",
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="An untrained network of a known checkpoint's shape (seed 0), to see what comes from training.",
)
@click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of noise and splits.")
@click.option(
    "--paper",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_paper,
    help="Print the commands for the tables of the paper, and stop.",
)
def select(
    checkpoint: str,
    out: Path,
    images: Path | None,
    masks: Path | None,
    keypoints: Path | None,
    task: str | None,
    size: int | None,
    rules: Path | None,
    max_channels: int | None,
    max_gflops: float | None,
    random_weights: bool,
    device: str,
    seed: int,
    **settings: Any,
) -> None:
    """Choose the activations of a network that make good features.

    The procedure of GDF (arXiv 2410.03558), measured: the properties of every activation on a few dozen images, a
    filter by rules, a comparison of what passes on masks, on matched points or, with neither, on known warps of the
    images, and a greedy choice under a budget. CHECKPOINT is a name or a diffusers folder. Writes OUT/recipe.yaml,
    which create_model(CHECKPOINT, recipe=...) takes and whose path is printed, its model card, OUT/activations.csv with
    everything that was measured, and OUT/report.html to look at. Calling it again goes on where it stopped.

    \b
    Examples:
      diffusion-backbones select tinysd -o selection/
      diffusion-backbones select sd15 --images photos/ --masks masks/ -o selection/ --max-channels 3520
      diffusion-backbones select my-finetune/ --images photos/ --keypoints pairs.json -o selection/
      diffusion-backbones select sdxl --images photos/ -o selection/ --device cuda --size 1024
    """
    if task and images:
        raise click.UsageError(
            "--task chooses among the package's own scenes; with --images, --masks or --keypoints say what is compared."
        )
    if (masks or keypoints) and not images:
        raise click.UsageError("--masks and --keypoints need --images.")
    if random_weights and (settings["checkpoint_path"] or checkpoint not in registry.list_checkpoints()):
        raise click.UsageError(
            "--random-weights builds a network of the package without any file, and goes neither with a folder nor "
            "with --checkpoint-path."
        )
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise click.ClickException("select needs scikit-learn: pip install 'diffusion-backbones[select]'") from error

    import torch
    from tqdm import tqdm

    from diffusion_backbones.cli.options import find_device
    from diffusion_backbones.factory.entry_points import architecture
    from diffusion_backbones.families import FAMILIES
    from diffusion_backbones.selection import data, run
    from diffusion_backbones.selection import rules as filtering

    path = settings["checkpoint_path"]
    known, configs = architecture(checkpoint, path if path and path.is_dir() else None)
    divisor = FAMILIES[known.family].size_divisibility(configs)
    side = size or known.input_size
    if side % divisor:
        fitting = side // divisor * divisor or divisor
        raise click.BadParameter(
            f"{side} is no multiple of {divisor}, which {known.name} needs; {fitting} is", param_hint="'--size'"
        )
    loaded_rules = filtering.load(rules) if rules else None
    looked = data.folder(images, side, masks, keypoints, seed) if images else data.scenes(side, task or "masks", seed)
    if random_weights:
        torch.manual_seed(0)

    def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
        bar: Iterable[Any] = tqdm(items, desc=what, leave=False, mininterval=1)
        return bar

    chosen = run.select(
        checkpoint, looked, out, pretrained=not random_weights, device=find_device(device), rules=loaded_rules, channels=max_channels, gflops=max_gflops,
        seed=seed, progress=progress, say=lambda text: click.echo(text, err=True), **settings,
    )  # fmt: skip
    for i, step in enumerate(chosen.steps):
        gain = f", {step.gain:+.2f} ± {step.error:.2f}" if i else ""
        click.echo(f"{step.id}: {chosen.metric} {step.score:.2f}{gain}", err=True)
    click.echo(f"to look at: {out / 'report.html'}", err=True)
    click.echo(out / "recipe.yaml")
