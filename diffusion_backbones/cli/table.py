"""What verbs print: rows in columns, or the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click


def exit_if_empty(rows: Sequence[Any]) -> None:
    """End with status 1, as ``grep`` does, if nothing matched."""
    if not rows:
        raise click.exceptions.Exit(1)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], data: Sequence[Any] | None, count: str) -> None:
    """Print rows in columns, or ``data`` as JSON.

    The heading and ``count`` go to stderr, so that stdout has one line for each row.
    """
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


def as_pattern(text: str) -> str:
    """A shell-style pattern; a word without ``*``, ``?`` or ``[`` matches anywhere."""
    return text if any(c in text for c in "*?[") else f"*{text}*"
