"""The kinds of arguments that verbs take, and every option that several of them share, declared once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from diffusion_backbones.spec import registry
from diffusion_backbones.spec.validation import closest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float16", "bfloat16", "float32")


class OutputPath(click.Path):
    """A path to write to, which is not empty: that would be the folder that one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; an empty one fails."""
        if not str(value).strip():
            self.fail("it is empty; name a file or folder, or . for this folder", param, ctx)
        return super().convert(value, param, ctx)


EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = OutputPath(dir_okay=False, path_type=Path)
OUTPUT = OutputPath(path_type=Path)
CENTRAL_SQUARE = "Resize the shorter side and cut out the central square, as timm does.  [default: no change]"
NEW_FOLDER = OutputPath(file_okay=False, path_type=Path)


class Name(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases of click
    """A backbone's name; ``places`` allows ``hf-hub:`` and ``local-dir:`` too, ``checkpoints`` a checkpoint's name,
    ``fusions`` a fusion's, also as ``a+b``.
    """

    name = "name"

    def __init__(self, places: bool = False, checkpoints: bool = False, fusions: bool = False):
        self.prefixes = ("hf-hub:", "local-dir:") if places else ()
        self.others = registry.list_checkpoints() if checkpoints else []
        self.fused = registry.list_fusions() if fusions else []

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is registered; an unknown one fails with the closest names."""
        if value.startswith(self.prefixes) or value in self.others or value in self.fused:
            return value
        try:
            if self.fused and "+" in value:
                from diffusion_backbones.factory import fusions  # torch, and timm, which may have a member

                fusions.find(value)
                return value
            return registry.get_declaration(value).name
        except KeyError as error:
            self.fail(str(error.args[0]), param, ctx)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """The names that begin so, for a shell's tab key."""
        from click.shell_completion import CompletionItem

        return [
            CompletionItem(name)
            for name in [*registry.list_models(include_tags=True), *self.others, *self.fused]
            if name.startswith(incomplete)
        ]


class Checkpoint(click.ParamType):  # type: ignore[type-arg]
    """A checkpoint's name, or a diffusers folder, which becomes ``local-dir:FOLDER``."""

    name = "checkpoint"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, or the folder as ``local-dir:``; anything else fails with the closest names."""
        known = registry.list_checkpoints()
        if value in known:
            return value
        if Path(value).is_dir():
            return f"local-dir:{value}"
        self.fail(
            f"{value!r} is neither a checkpoint nor a folder.{closest(value, known)} `diffusion-backbones list "
            "--checkpoints` lists the checkpoints.",
            param,
            ctx,
        )


class Levels(click.ParamType):  # type: ignore[type-arg]
    """``2,0`` -> (0, 2), in ascending order."""

    name = "levels"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The positions; anything else, or one of them twice, fails."""
        parts = value.split(",")
        if not all(part.strip().isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
            self.fail(
                f"{value!r} must be different positions such as 0,2, counted from 0 for the finest level", param, ctx
            )
        return tuple(sorted(map(int, parts)))


def shared(*names: str, **settings: Any) -> Callable[..., Callable[[F], F]]:
    """Declare an option that several verbs have. A verb may replace settings, such as the help text."""

    def option(**changes: Any) -> Callable[[F], F]:
        return click.option(*names, **{**settings, **changes})

    return option


device = shared(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.",
)
dtype = shared("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
size = shared("--size", type=click.IntRange(min=1), metavar="PIXELS")
levels = shared(
    "--levels",
    type=Levels(),
    help="Only these levels, 0 being the finest: 0,2. Fewer make a shorter network.  [default: all]",
)
checkpoint_path = shared(
    "--checkpoint-path",
    type=EXISTING,
    help="A diffusers folder, a saved backbone or a .safetensors file in place of the published weights.",
)
random_weights = shared(
    "--random-weights", is_flag=True, help="Use random weights (seed 0), to try things without a download."
)
prompt = shared("--prompt", metavar="TEXT", help="Prompt in place of the recipe's.")
timestep = shared("--timestep", type=int, metavar="T", help="Timestep in place of the recipe's.")
encoder = shared(
    "--encoder",
    type=click.Choice(["tiny"]),
    help="Use a distilled image encoder in place of the exact one: faster, with other features.",
)
overwrite = shared("--overwrite", is_flag=True)
max_pixels = shared(
    "--max-pixels",
    type=click.IntRange(min=1),
    metavar="N",
    help="Read image files of up to this many pixels.  [default: 179 million, more may be an attack]",
)
table = shared("--csv", "table", type=NEW_FILE)
json_output = shared("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


@dataclass(frozen=True)
class ModelOptions:
    """Which backbone runs, and where: the values of the options of :func:`model_options`."""

    levels: tuple[int, ...] | None
    device: str
    checkpoint_path: Path | None
    random_weights: bool
    prompt: str | None
    timestep: int | None
    encoder: str | None = None

    def check(self, name: str) -> None:
        """Raise ``UsageError`` if ``--random-weights`` contradicts the name or another option."""
        given: Mapping[str, Any] = {"--checkpoint-path": self.checkpoint_path, "--prompt": self.prompt}
        contradicting = [option for option, value in given.items() if value is not None]
        if self.random_weights and (contradicting or ":" in name):
            raise click.UsageError(
                "--random-weights builds a registered backbone without any file, so without a text encoder, and does "
                f"not go with {contradicting[0] if contradicting else name}."
            )


def model_options(with_encoder: bool = True) -> Callable[[F], F]:
    """The options that say which backbone runs, handed to the verb as one :class:`ModelOptions` named ``model``."""
    options = [levels, device, checkpoint_path, random_weights, prompt, timestep, *([encoder] if with_encoder else [])]

    def decorate(function: F) -> F:
        @wraps(function)
        def verb(*args: Any, **given: Any) -> Any:
            chosen = {field.name: given.pop(field.name) for field in fields(ModelOptions) if field.name in given}
            return function(*args, **given, model=ModelOptions(**chosen))

        for option in reversed(options):
            verb = option()(verb)
        return verb  # type: ignore[return-value]

    return decorate


@contextmanager
def wrong(option: str) -> Iterator[None]:
    """An error in this block is one of an option's value: status 2, and the option is named."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint=f"'{option}'") from error


def argument_of(context: click.Context, name: str) -> click.Parameter:
    """The argument of a verb that is called so, for errors that name it."""
    return next(parameter for parameter in context.command.params if parameter.name == name)
