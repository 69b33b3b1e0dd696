"""What a verb says before it can do anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from diffusion_backbones.ops.large_libraries import uncollected


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Import libraries in this block, which takes seconds. On a terminal it is said at once what is loaded."""
    if sys.stderr.isatty():
        click.echo(f"Loading {what} ...", err=True)
    with uncollected():
        yield
