"""``diffusion-backbones select``: choose the activations of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.build import find_device
from diffusion_backbones.cli.loading import loading
from diffusion_backbones.cli.options import EXISTING_FILE, EXISTING_FOLDER, NEW_FOLDER, Checkpoint
from diffusion_backbones.selection import paper
from diffusion_backbones.spec import registry

if TYPE_CHECKING:
    from diffusion_backbones.selection.data import Data
    from diffusion_backbones.selection.result import Selection


def _print_paper(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001  # click's signature
    if value:
        click.echo(paper.text())
        ctx.exit()


@click.command()
@click.argument("checkpoint", type=Checkpoint())
@click.option("-o", "--out", required=True, type=NEW_FOLDER, help="Folder for the results.")
@click.option(
    "--images", type=EXISTING_FOLDER, help="A few dozen of your images.  [default: the drawn scenes in the package]"
)
@click.option("--masks", type=EXISTING_FOLDER, help="A .png of class numbers for every image: compare on segmentation.")
@click.option("--keypoints", type=EXISTING_FILE, help="A JSON list of matched points: compare on correspondence.")
@click.option(
    "--task",
    type=click.Choice(["masks", "keypoints", "warps"]),
    help="Which of the package's own tasks to compare on, without --images.  [default: masks]",
)
@options.size(type=click.IntRange(min=64), help="Side of the squares that images become.  [default: the checkpoint's]")
@options.max_pixels()
@options.timestep(type=float, default=50, show_default=True, help="Timestep at which the network is read.")
@options.prompt(help="Prompt that the network reads.  [default: empty]")
@click.option(
    "--ids",
    multiple=True,
    default=("*",),
    metavar="PATTERN",
    help="Compare only these activations, such as 'up-*'; may be given again.",
)
@click.option(
    "--rules", type=EXISTING_FILE, help="A YAML file of rules in place of the paper's; one that holds [] drops nothing."
)
@click.option("--everything", is_flag=True, help="Also compare what the rules drop, to see what they cost.")
@click.option(
    "--draws",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Noise draws for each image that properties are measured on.",
)
@click.option("--max-channels", type=click.IntRange(min=1), help="Most channels of the whole pyramid.")
@click.option(
    "--max-gflops",
    type=click.FloatRange(min=0, min_open=True),
    help="Most GFLOPs of the denoiser up to the last activation, for one image.",
)
@click.option(
    "--members", type=click.IntRange(min=1), default=6, show_default=True, help="Most activations in the recipe."
)
@click.option(
    "--discard", type=click.Choice(["auto"]), help="Set the massive channels of every candidate to zero, found once."
)
@click.option("--normalize", type=click.Choice(["layer", "l2"]), help="Normalize every candidate, as a recipe does.")
@options.checkpoint_path(help="A diffusers folder or a .safetensors file in place of the published weights.")
@options.random_weights(
    help="Use an untrained network of a known checkpoint's shape (seed 0), to see what comes from training."
)
@options.device()
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of noise and splits.")
@click.option(
    "--paper",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_paper,
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
    max_pixels: int | None,
    rules: Path | None,
    max_channels: int | None,
    max_gflops: float | None,
    random_weights: bool,
    checkpoint_path: Path | None,
    device: str,
    seed: int,
    **settings: Any,
) -> None:
    """Choose the activations of a network that make good features.

    The procedure of GDF (arXiv 2410.03558), measured: the properties of every activation on a few dozen images, a
    filter by rules, a comparison of what passes on masks, on matched points or, with neither, on known warps of the
    images, and a greedy choice under a budget. CHECKPOINT is a name or a diffusers folder. Writes OUT/recipe.yaml,
    which create_model(CHECKPOINT, recipe=...) takes and whose path is printed, its model card, OUT/activations.csv with
    everything that was measured, and OUT/report.html to look at. Run it again to resume.

    \b
    Examples:
      diffusion-backbones select tinysd -o selection/
      diffusion-backbones select sd15 --images photos/ --masks masks/ -o selection/ --max-channels 3520
      diffusion-backbones select my-finetune/ --images photos/ --keypoints pairs.json -o selection/
      diffusion-backbones select sdxl --images photos/ -o selection/ --device cuda --size 1024
    """
    _check_usage(images, masks or keypoints, task)
    _check_apart(images, out)
    _check_random(random_weights, checkpoint, checkpoint_path)

    with loading(checkpoint):
        import torch

        from diffusion_backbones.selection import rules as filtering  # torch
        from diffusion_backbones.selection import run

    side = _side(checkpoint, checkpoint_path, size)
    data = _data(images, masks, keypoints, task, side, seed, max_pixels)
    if random_weights:
        torch.manual_seed(0)
    selection = run.select(
        checkpoint,
        data,
        out,
        pretrained=not random_weights,
        checkpoint_path=checkpoint_path,
        device=find_device(device),
        rules=filtering.load(rules) if rules else None,
        channels=max_channels,
        gflops=max_gflops,
        seed=seed,
        progress=_progress,
        say=lambda text: click.echo(text, err=True),
        **settings,
    )
    _print_choice(selection, out)


def _check_usage(images: Path | None, labels: Path | None, task: str | None) -> None:
    if task and images:
        raise click.UsageError(
            "--task chooses among the package's own scenes; with --images, --masks or --keypoints say what is compared."
        )
    if labels and not images:
        raise click.UsageError("--masks and --keypoints need --images.")
    if find_spec("sklearn") is None:
        raise click.ClickException("select needs scikit-learn: pip install 'diffusion-backbones[select]'")


def _check_apart(images: Path | None, out: Path) -> None:
    """The results hold pictures, which the next run would take for images."""
    if images and (out.resolve() == images.resolve() or images.resolve() in out.resolve().parents):
        raise click.BadParameter(f"{out} is in the folder of the images; choose one beside it", param_hint="'-o'")


def _check_random(random_weights: bool, checkpoint: str, checkpoint_path: Path | None) -> None:
    if random_weights and (checkpoint_path or checkpoint not in registry.list_checkpoints()):
        raise click.UsageError(
            "--random-weights builds a network of the package without any file, and goes neither with a folder nor "
            "with --checkpoint-path."
        )


def _side(checkpoint: str, checkpoint_path: Path | None, size: int | None) -> int:
    """Side of the square images in pixels, which must suit the network."""
    from diffusion_backbones.factory.entry_points import architecture  # torch

    folder = checkpoint_path if checkpoint_path and checkpoint_path.is_dir() else None
    known, network = architecture(checkpoint, folder)
    side, divisor = size or known.input_size, network.size_divisibility
    if side % divisor:
        fitting = side // divisor * divisor or divisor
        raise click.BadParameter(
            f"{known.name} needs a multiple of {divisor}, such as {fitting}, got {side}", param_hint="'--size'"
        )
    return side


def _data(
    images: Path | None,
    masks: Path | None,
    keypoints: Path | None,
    task: str | None,
    side: int,
    seed: int,
    max_pixels: int | None,
) -> Data:
    from diffusion_backbones.selection import data  # torch

    if images is None:
        return data.scenes(side, task or "masks", seed)
    return data.folder(images, side, masks, keypoints, seed, max_pixels)


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=what, leave=False, mininterval=1)
    return bar


def _print_choice(selection: Selection, out: Path) -> None:
    """The steps of the choice on stderr, and the recipe's path on stdout."""
    for i, step in enumerate(selection.steps):
        gain = f", {step.gain:+.2f} ± {step.error:.2f}" if i else ""
        click.echo(f"{step.id}: {selection.metric} {step.score:.2f}{gain}", err=True)
    click.echo(f"to look at: {out / 'report.html'}", err=True)
    click.echo(out / "recipe.yaml")
