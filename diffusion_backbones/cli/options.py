"""What the verbs of the command line share: kinds of arguments, the options that say which backbone runs, and building
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from diffusion_backbones.spec import registry

if TYPE_CHECKING:
    import torch
    from click.shell_completion import CompletionItem

    from diffusion_backbones.backbone.module import DiffusionBackbone


class Program(click.Group):
    """The verbs, with the library's errors told in one line, and Ctrl-C answered with 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # `| head`: click ends quietly
            raise
        except (KeyError, ValueError, TypeError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            text = (
                error.args[0] if isinstance(error, KeyError) and error.args else error
            )  # str() of a KeyError is a repr
            raise click.ClickException(" ".join(str(text).split())) from error


class Name(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases of click
    """A backbone's name; ``places`` allows ``hf-hub:`` and ``local-dir:`` too, ``checkpoints`` a checkpoint's name."""

    name = "name"

    def __init__(self, places: bool = False, checkpoints: bool = False):
        self.prefixes = ("hf-hub:", "local-dir:") if places else ()
        self.others = registry.list_checkpoints() if checkpoints else []

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.startswith(self.prefixes) or value in self.others:
            return value
        try:
            return registry.get_declaration(value).name
        except KeyError as error:
            self.fail(str(error.args[0]), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [
            CompletionItem(name)
            for name in [*registry.list_models(include_tags=True), *self.others]
            if name.startswith(incomplete)
        ]


class Levels(click.ParamType):  # type: ignore[type-arg]
    """``0,2`` -> (0, 2), growing."""

    name = "levels"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",")
        if not all(part.strip().isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
            self.fail(
                f"{value!r} must be different positions such as 0,2, counted from 0 for the finest level", param, ctx
            )
        return tuple(sorted(map(int, parts)))


encoder_option = click.option(
    "--encoder",
    type=click.Choice(["tiny"]),
    help="A distilled image encoder in place of the exact one: faster, and other features.",
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which backbone runs, and where; :func:`_build` takes them."""
    path = click.Path(exists=True, path_type=Path)
    options = [
        click.option(
            "--size",
            type=click.IntRange(min=1),
            metavar="PIXELS",
            help="Resize the shorter side and cut out the central square, as timm does.  [default: no change]",
        ),
        click.option(
            "--levels",
            type=Levels(),
            help="Only these, 0 being the finest: 0,2. Fewer make a shorter network.  [default: all]",
        ),
        click.option(
            "--device",
            metavar="NAME",
            default="auto",
            show_default=True,
            help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.",
        ),
        click.option(
            "--checkpoint-path",
            type=path,
            help="A diffusers folder, a saved backbone or a .safetensors file, not the published weights.",
        ),
        click.option(
            "--random-weights", is_flag=True, help="Random weights (seed 0), to try things without a download."
        ),
        click.option("--prompt", help="In place of the recipe's."),
        click.option("--timestep", type=int, help="In place of the recipe's."),
        encoder_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _argument(context: click.Context, name: str) -> click.Parameter:
    return next(parameter for parameter in context.command.params if parameter.name == name)


class Built(NamedTuple):
    """A backbone, and a description of its weights if they are random."""

    backbone: DiffusionBackbone
    weights: Mapping[str, str] | None


def _check_random(name: str, model: Mapping[str, Any]) -> None:
    contradicting = [option for option in ("checkpoint_path", "prompt") if model[option] is not None]
    if model["random_weights"] and (contradicting or ":" in name):
        other = f"--{contradicting[0].replace('_', '-')}" if contradicting else name
        raise click.UsageError(
            "--random-weights builds a registered backbone without any file, so without a text encoder, and does not "
            f"go with {other}."
        )


def _build(
    name: str,
    levels: tuple[int, ...] | None,
    dtype: str | None,
    *,
    device: str,
    checkpoint_path: Path | None,
    random_weights: bool,
    **settings: Any,
) -> Built:
    import torch

    from diffusion_backbones.evaluation.visualize import UNTRAINED
    from diffusion_backbones.factory.entry_points import create_model

    where = find_device(device)
    if random_weights:
        torch.manual_seed(0)
    backbone = create_model(
        name,
        pretrained=not random_weights,
        checkpoint_path=checkpoint_path,
        out_indices=levels,
        dtype=None if where.type == "cpu" else dtype,
        device=where,
        **settings,
    )
    if random_weights:
        click.echo(UNTRAINED, err=True)
    described = {"random": f"seed 0 on {where.type}"} | (
        {"encoder": settings["encoder"]} if settings.get("encoder") else {}
    )
    return Built(backbone, described if random_weights else None)


def find_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(
            f"{name!r} cannot be used here: {str(error).splitlines()[0]}", param_hint="'--device'"
        ) from error
    return device
