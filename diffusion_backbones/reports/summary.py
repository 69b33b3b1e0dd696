"""The output of the command line about checkpoints, backbones and activations: text for people, dictionaries for
machines. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from diffusion_backbones.families import architecture
from diffusion_backbones.reports.facts import (
    BackboneFacts,
    CheckpointFacts,
    access,
    cite,
)
from diffusion_backbones.reports.markdown import HUB, gflops, millions, plain
from diffusion_backbones.reports.settings import postprocessing, times
from diffusion_backbones.spec.activations import Site, parse
from diffusion_backbones.spec.aggregated_attention import sizes
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.declaration import Declaration

Lines = Iterator[tuple[str, str]]
"""(heading, text); the heading is empty where the line before goes on."""


def checkpoint(found: Checkpoint) -> dict[str, Any]:
    """A row of ``list --checkpoints``, JSON-able."""
    return {
        "name": found.name,
        "title": found.title,
        "hub_id": found.hub_id,
        "license": str(found.license),
        "gated": found.gated,
        "input_size": found.input_size,
    }


def backbone(declaration: Declaration) -> dict[str, Any]:
    """A row of ``list``, JSON-able."""
    levels = BackboneFacts.of(declaration).plan.levels
    return {
        "name": declaration.name,
        "levels": [{"channels": level.channels, "stride": level.stride} for level in levels],
        "license": str(declaration.checkpoint.license),
        "gated": declaration.checkpoint.gated,
    }


def activations(
    checkpoint: Checkpoint, pattern: str, extensions: bool, size: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Rows of ``activations``, and how many there are without a pattern.

    Args:
        checkpoint: A checkpoint whose architecture is in the package.
        pattern: Shell-style, for ids.
        extensions: Also the ids that go beyond GDF's.
        size: Side in pixels of a square image; each row then has the shape for it, padded and without batch.
    """
    network = architecture(checkpoint)
    catalogue = network.catalogue
    found = catalogue.find(pattern, extensions)
    rows = [asdict(site) | {"port": str(site.port)} for site in found]
    for row in rows:
        del row["parts"], row["rows"]
    if size is not None:
        side = size + -size % network.size_divisibility
        tokens = network.text_tokens
        for row in rows:
            row["shape"] = shape(catalogue[row["id"]], side, tokens)
    return rows, len(catalogue.find("*", extensions)) + sum(bool(site.parts) for site in found)


def shape(site: Site, side: int, tokens: int) -> tuple[int, ...]:
    """Shape, without batch, of an activation for ``side`` x ``side`` pixels, a multiple of its stride, and ``tokens``
    text tokens.
    """
    n = side // site.stride
    if site.parts and site.layout == "attention":
        return sum((side // stride) ** 2 for stride in sizes(site.parts)), n, n
    if site.layout == "map":
        return site.channels, n, n
    if site.layout == "tokens":
        return n * n, site.channels
    return site.channels, n * n, n * n if parse(site.id).kind == "self-map" else tokens


def facts(declaration: Declaration) -> dict[str, Any]:
    """The JSON of ``info`` for a backbone."""
    return BackboneFacts.of(declaration).as_dict()


def facts_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON of ``info`` for a checkpoint; the costs are those of its whole network."""
    return CheckpointFacts.of(checkpoint).as_dict()


def about(declaration: Declaration) -> Lines:
    """The lines of ``info`` for a backbone."""
    known, recipe = BackboneFacts.of(declaration), declaration.recipe
    cost = known.cost
    paper = f" of {cite(recipe.paper)}, {recipe.paper.link}" if recipe.paper else ""
    yield "backbone", f"{declaration.name}: {declaration.checkpoint.title}, read by {recipe.name}{paper}"
    yield from _continued("levels", _levels(known))
    yield "input", f"{declaration.input_size} x {declaration.input_size} in the source, any size here"
    yield "timestep", known.timestep
    seed = f", seed {recipe.seed}" if recipe.noise == "fixed" else ""
    yield "noise", f"{recipe.noise}{seed}{f', mean of {recipe.ensemble} draws' if recipe.ensemble > 1 else ''}"
    classes = f", for each of {len(recipe.classes)} classes" if recipe.classes else ""
    yield "prompt", f"{repr(recipe.prompt) if recipe.prompt else 'empty'}{classes}"
    yield from _continued("afterwards", filter(None, [postprocessing(recipe)]))
    yield (
        "parameters",
        f"denoiser {known.kept.replace(' of', ' kept of')}, image encoder {millions(cost.encoder_parameters)}",
    )
    tiny = (
        f"with encoder='tiny': image encoder {gflops(cost.tiny_encoder_gflops)} GFLOPs, "
        f"{millions(cost.tiny_encoder_parameters)}"
    )
    operations = plain(f"{known.operations(times(known.plan.passes))}, for one image of {cost.size} × {cost.size}")
    yield from _continued("operations", [operations, tiny] if cost.tiny_encoder_gflops else [operations])
    yield "to read", known.memory
    yield from _weights(known.checkpoint)
    yield "source", recipe.source or "none: nobody published this recipe"
    yield from _continued("notes", [*filter(None, [known.checkpoint.status]), *recipe.notes])
    yield from _continued("unverified", [*recipe.unverified, *known.doubts])


def about_checkpoint(checkpoint: Checkpoint) -> Lines:
    """The lines of ``info`` for a checkpoint; the costs are those of its whole network."""
    known = CheckpointFacts.of(checkpoint)
    yield "checkpoint", f"{checkpoint.name}: {checkpoint.title}"
    yield "recipes", ", ".join(known.backbones) or "none published: give recipe= to create_model"
    yield "input", f"{checkpoint.input_size} x {checkpoint.input_size} in training, any size here"
    yield "noise", known.noise
    yield "conditioned", plain(known.conditioning)
    yield "activations", f"{known.activations}: diffusion-backbones activations {checkpoint.name} --all"
    yield "parameters", known.parameters
    yield "to read", f"{known.memory} for the whole network; a recipe reads what is in front of its last activation"
    yield from _weights(checkpoint)
    yield from _continued("notes", filter(None, [checkpoint.status]))
    yield from _continued("unverified", known.doubts)


def _levels(known: BackboneFacts) -> Iterator[str]:
    for i, level in enumerate(known.plan.levels):
        for j, site in enumerate(level.sites):
            first = "" if j else f"{i}: {level.channels} @ {level.stride}"
            yield f"{first:14}{site.id}"


def _weights(checkpoint: Checkpoint) -> Lines:
    place = f"{checkpoint.hub_id} @ {checkpoint.revision}" if checkpoint.hub_id else "in the package"
    file = checkpoint.denoiser
    denoiser = [f"denoiser: {file.repo} @ {file.revision}, {file.filename}"] if file else []
    yield from _continued("weights", [place, *denoiser, *(f"mirror: {mirror}" for mirror in checkpoint.mirrors)])
    gate = f": accept the licence at {HUB}/{checkpoint.hub_id}" if checkpoint.gated else ""
    yield "access", access(checkpoint) + gate
    yield "licence", " ".join(filter(None, [str(checkpoint.license), checkpoint.license.link]))


def _continued(heading: str, texts: Iterable[str]) -> Lines:
    """Lines that share one heading."""
    for i, text in enumerate(texts):
        yield "" if i else heading, text
