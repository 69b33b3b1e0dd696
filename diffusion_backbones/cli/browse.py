"""The verbs that read declarations and configs: ``list``, ``info``, ``activations`` and ``card``. None loads torch,
but for a fusion, whose members may be timm's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from diffusion_backbones.cli import options
from diffusion_backbones.cli.options import Name
from diffusion_backbones.cli.table import as_pattern, exit_if_empty, print_table
from diffusion_backbones.reports import backbone_card, checkpoint_card, facts, fusion_card, summary
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.fused_levels import FusedLevel
from diffusion_backbones.spec.fusion import Fusion
from diffusion_backbones.surgery.plan import Plan


@click.command(name="list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only backbones with trained weights, tags included.")
@click.option("--checkpoints", is_flag=True, help="List checkpoints, the networks that recipes read, not backbones.")
@click.option("--fusions", is_flag=True, help="List fusions, several backbones read as one.")
@options.json_output()
def list_backbones(pattern: str, pretrained: bool, checkpoints: bool, fusions: bool, as_json: bool) -> None:
    """List backbones.

    One line each: name, channels@stride of every level from fine to coarse, licence of the weights, and how to get
    them. PATTERN is shell-style; a word without *, ? or [ matches anywhere in the name. The status is 1 if none does.

    \b
    Examples:
      diffusion-backbones list
      diffusion-backbones list 'sd15_*'
      diffusion-backbones list gdf --json
      diffusion-backbones list --checkpoints
    """
    if fusions and checkpoints:
        raise click.UsageError("Give --checkpoints or --fusions, one list at a time.")
    if fusions:
        _print_fusions(as_pattern(pattern), as_json)
    elif checkpoints:
        _print_checkpoints(as_pattern(pattern), as_json)
    else:
        _print_backbones(as_pattern(pattern), pretrained, as_json)


def _print_checkpoints(pattern: str, as_json: bool) -> None:
    known = [registry.get_checkpoint(name) for name in registry.list_checkpoints(pattern)]
    head = ["name", "licence", "access", "pixels", "weights"]
    rows = [[c.name, str(c.license), facts.access(c), str(c.input_size), c.hub_id or "in the package"] for c in known]
    print_table(head, rows, [summary.checkpoint(c) for c in known] if as_json else None, f"{len(rows)} checkpoints")
    exit_if_empty(rows)


def _print_fusions(pattern: str, as_json: bool) -> None:
    known = [registry.get_fusion(name) for name in registry.list_fusions(pattern)]
    rows = [
        [f.name, " + ".join(m.name for m in f.members), "; ".join(dict.fromkeys(map(str, f.licenses.values())))]
        for f in known
    ]
    data = [f.described() for f in known] if as_json else None
    print_table(["name", "members", "licences"], rows, data, f"{len(rows)} fusions")
    exit_if_empty(rows)


def _is_fusion(name: str) -> bool:
    return name in registry.list_fusions() or "+" in name


def _fused(name: str) -> tuple[Fusion, Sequence[FusedLevel]]:
    """A fusion and its levels, which networks of timm have to be built for, without memory."""
    from diffusion_backbones.factory.entry_points import create_model  # torch

    fused: Any = create_model(name, device="meta")
    return fused.declaration, fused.levels


def _print_backbones(pattern: str, pretrained: bool, as_json: bool) -> None:
    declared = [registry.get_declaration(name) for name in registry.list_models(pattern, pretrained=pretrained)]
    head = ["name", "channels@stride", "licence", "access"]
    rows = [
        [
            d.name,
            facts.channels_at_strides(Plan.of(d).levels),
            str(d.checkpoint.license),
            facts.access(d.checkpoint),
        ]
        for d in declared
    ]
    bare = [name for name in registry.list_checkpoints(pattern) if not facts.read_by(registry.get_checkpoint(name))]
    more = f"; {len(bare)} checkpoints without a published recipe match too: list --checkpoints" if bare else ""
    data = [summary.backbone(d) for d in declared] if as_json else None
    print_table(head, rows, data, f"{len(rows)} backbones{more}")
    exit_if_empty(rows)


@click.command()
@click.argument("name", type=Name(checkpoints=True, fusions=True))
@options.json_output()
def info(name: str, as_json: bool) -> None:
    """Describe a backbone: what it is, what it returns and what it costs.

    NAME may be a checkpoint too: its facts, and the cost of its whole network; or a fusion, also as A+B.

    \b
    Examples:
      diffusion-backbones info sd15_gdf
      diffusion-backbones info sd35_large
      diffusion-backbones info sdxl_gdf --json
    """
    if _is_fusion(name):
        fusion, levels = _fused(name)
        data, lines = fusion_card.facts(fusion, levels), fusion_card.about(fusion, levels)
    elif name in registry.list_checkpoints():
        checkpoint = registry.get_checkpoint(name)
        data, lines = summary.facts_of_checkpoint(checkpoint), summary.about_checkpoint(checkpoint)
    else:
        declaration = registry.get_declaration(name)
        data, lines = summary.facts(declaration), summary.about(declaration)
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        for heading, text in lines:
            click.echo(f"{heading:12}{text}")


@click.command()
@click.argument("name", type=Name(checkpoints=True))
@click.argument("pattern", default="*")
@options.size(help="Add the shapes for one square image of this many pixels a side, padded as the backbone pads it.")
@click.option(
    "--all",
    "extensions",
    is_flag=True,
    help="Add the ids that go beyond GDF's, such as outputs of attention layers and maps of the image encoder.",
)
@options.json_output()
def activations(name: str, pattern: str, size: int | None, extensions: bool, as_json: bool) -> None:
    """List every activation of a network.

    One line each: id, module path, port, channels, stride, and with --size the shape. NAME is a backbone or a
    checkpoint; its whole network is listed, in forward order. PATTERN is shell-style; a word without *, ? or [ matches
    anywhere in the id. The port says what is read of the module: its output, its input, or the attention map of its
    queries and keys, whose channels are heads. The status is 1 if none matches.

    \b
    Examples:
      diffusion-backbones activations sd15
      diffusion-backbones activations sdxl 'up-*-cross-q' --size 1024
      diffusion-backbones activations sd15_gdf self --all --json
    """
    known, pattern = registry.list_checkpoints(), as_pattern(pattern)
    checkpoint = registry.get_checkpoint(name) if name in known else registry.get_declaration(name).checkpoint
    found, total = summary.activations(checkpoint, pattern, extensions, size)
    more = 0 if extensions else len(summary.activations(checkpoint, pattern, True, None)[0]) - len(found)
    count = f"{len(found)} of {total} activations of {checkpoint.name}" + (
        f"; --all adds {more} that go beyond GDF's" if more else ""
    )
    head = ["id", "path", "port", "channels", "stride", *(["shape"] if size else [])]
    rows = [[" x ".join(map(str, row[key])) if key == "shape" else str(row[key]) for key in head] for row in found]
    print_table(head, rows, found if as_json else None, count)
    exit_if_empty(rows)


@click.command()
@click.argument("name", type=Name(checkpoints=True, fusions=True))
def card(name: str) -> None:
    """Print the card of a backbone or a checkpoint, in Markdown.

    \b
    Examples:
      diffusion-backbones card sd15_gdf > README.md
      diffusion-backbones card sd35_large
    """
    if _is_fusion(name):
        click.echo(fusion_card.card(*_fused(name)), nl=False)
        return
    known = name in registry.list_checkpoints()
    text = (
        checkpoint_card.card(registry.get_checkpoint(name))
        if known
        else backbone_card.card(registry.get_declaration(name))
    )
    click.echo(text, nl=False)
