"""``diffusion-backbones``: the command line. Data goes to stdout, everything else to stderr.

``list``, ``info``, ``activations`` and ``card`` read declarations and configs: no torch, no network, an answer at once.
Exit status: 0; 1 for failures and where nothing matches; 2 for wrong usage, unknown names included; 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import click

from diffusion_backbones._version import __version__
from diffusion_backbones.cli.browse import activations, card, info, list_backbones
from diffusion_backbones.cli.concepts import concepts
from diffusion_backbones.cli.export import export
from diffusion_backbones.cli.extract import extract
from diffusion_backbones.cli.measure import bench, compare
from diffusion_backbones.cli.select import select
from diffusion_backbones.cli.visualize import visualize


def _quiet_libraries() -> None:
    """Leave out what libraries warn of when they are imported: whoever types a command cannot act on it."""
    warnings.filterwarnings("ignore", module=r"(?!diffusion_backbones\b)")
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


class Program(click.Group):
    """The verbs. Prints library errors on one line; exits with 130 on Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb."""
        _quiet_libraries()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except (BrokenPipeError, click.ClickException, click.exceptions.Exit, click.Abort):  # `| head` ends quietly
            raise
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """What an error says, on one line; with its kind where it says nothing or comes from a library."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # its str() is a repr
    text = " ".join(str(said).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory; give smaller images, or --size"
    ours = isinstance(error, (KeyError, ValueError, TypeError, OSError, ImportError))
    return text if ours and text else f"{type(error).__name__}: {text}; --traceback shows where it comes from"


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="diffusion-backbones")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def main(traceback: bool) -> None:
    """timm for diffusion features: which backbones there are, what they return, and the features of whole folders.

    \b
    Examples:
      diffusion-backbones list 'sd15*'
      diffusion-backbones info sd15_gdf
      diffusion-backbones activations sd15 cross-q --size 512
      diffusion-backbones extract sd15_gdf photos/ -o features/ --size 512
      diffusion-backbones visualize sd15_gdf photo.jpg -o picture.png
      diffusion-backbones concepts sd15_gdf photo.jpg cat sky -o picture.png
      diffusion-backbones select tinysd -o selection/
      diffusion-backbones bench tinysd_gdf
      diffusion-backbones compare tinysd_gdf --encoder tiny
      diffusion-backbones export sd15_gdf -o backbone.pt2
      diffusion-backbones card sd15_gdf
    """


VERBS = (list_backbones, info, activations, card, extract, visualize, concepts, bench, compare, export, select)
for command in VERBS:
    main.add_command(command)
