"""What the command line says about checkpoints, backbones and activations: text for people, dictionaries for machines.

Declarations and architecture configs are all it reads. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.reports import backbone_card, checkpoint_card
from diffusion_backbones.reports.costs import costs, entire
from diffusion_backbones.spec.activations import Site, parse
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import package_configs
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg


def access(checkpoint: Checkpoint) -> str:
    """How the weights are had: ``gated``, ``open``, or ``built in`` if they travel in the package."""
    return "gated" if checkpoint.gated else "open" if checkpoint.hub_id else "built in"


def checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A row of ``list --checkpoints``."""
    return {
        "name": checkpoint.name,
        "title": checkpoint.title,
        "hub_id": checkpoint.hub_id,
        "license": str(checkpoint.license),
        "gated": checkpoint.gated,
        "input_size": checkpoint.input_size,
    }


def backbone(declaration: Declaration) -> dict[str, Any]:
    """A row of ``list``."""
    return {
        "name": declaration.name,
        "levels": [{"channels": info["num_chs"], "stride": info["reduction"]} for info in feature_info(declaration)],
        "license": str(declaration.checkpoint.license),
        "gated": declaration.checkpoint.gated,
    }


def feature_info(declaration: Declaration) -> list[dict[str, Any]]:
    """timm's ``feature_info`` of a backbone that nobody built, fine to coarse."""
    return [
        {
            "num_chs": sum(site.channels for site in level),
            "reduction": level[0].stride,
            "module": "+".join(site.path for site in level),
            "index": i,
        }
        for i, level in enumerate(backbone_card.levels(declaration))
    ]


def activations(
    checkpoint: Checkpoint, pattern: str, extensions: bool, size: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Rows of ``activations``, and how many there are without a pattern.

    Args:
        pattern: Shell-style, for ids.
        extensions: Also the ids that go beyond GDF's.
        size: Side in pixels of a square image, whose shapes, padded and without batch, are told.
    """
    configs, family = package_configs(checkpoint), FAMILIES[checkpoint.family]
    catalogue = family.activations(configs, checkpoint.name)
    rows = [asdict(site) for site in catalogue.find(pattern, extensions)]
    if size is not None:
        side = size + -size % family.size_divisibility(configs)
        tokens = family.text_tokens(configs)
        for row in rows:
            row["shape"] = shape(catalogue[row["id"]], side, tokens)
    return rows, len(catalogue.find("*", extensions))


def shape(site: Site, side: int, tokens: int) -> tuple[int, ...]:
    """Shape, without batch, of an activation for ``side`` x ``side`` pixels, a multiple of its stride, and ``tokens``
    text tokens.
    """
    n = side // site.stride
    if site.layout == "map":
        return site.channels, n, n
    if site.layout == "tokens":
        return n * n, site.channels
    return site.channels, n * n, n * n if parse(site.id).kind == "self-map" else tokens


def facts(declaration: Declaration) -> dict[str, Any]:
    """All that ``info`` knows, JSON-able."""
    cost = costs(declaration)
    return {
        "name": declaration.name,
        "checkpoint": asdict(declaration.checkpoint),
        "recipe": declaration.recipe.to_dict(),
        "recipe_digest": declaration.recipe.digest,
        "feature_info": feature_info(declaration),
        "costs": {**asdict(cost), "bytes": cost.bytes},
        "pretrained_cfg": pretrained_cfg(declaration),
    }


def about(declaration: Declaration) -> Iterator[tuple[str, str]]:
    """The lines of ``info``: (heading, text), the heading empty where the one before goes on."""
    checkpoint = declaration.checkpoint
    yield from _what(declaration)
    yield from _levels(declaration)
    yield from _recipe(declaration)
    yield from _costs(declaration)
    yield from _weights(checkpoint)
    yield "source", declaration.recipe.source or "none: nobody published this recipe"
    yield from _sentences("notes", [*filter(None, [checkpoint.status]), *declaration.recipe.notes])
    yield from _sentences("unverified", [*declaration.recipe.unverified, *_doubts(checkpoint)])


def facts_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that ``info`` knows of a checkpoint, JSON-able; the costs are those of its whole network."""
    configs, family, cost = package_configs(checkpoint), FAMILIES[checkpoint.family], costs(entire(checkpoint))
    return {
        "name": checkpoint.name,
        "checkpoint": asdict(checkpoint),
        "backbones": checkpoint_card.read_by(checkpoint),
        "conditioning": family.conditioning_shapes(configs),
        "activations": len(family.catalogue(configs, checkpoint.name).all()),
        "costs": {**asdict(cost), "bytes": cost.bytes},
    }


def about_checkpoint(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The lines of ``info`` for a checkpoint, as those of :func:`about`; the costs are those of its whole network."""
    configs, family, cost = package_configs(checkpoint), FAMILIES[checkpoint.family], costs(entire(checkpoint))
    yield "checkpoint", f"{checkpoint.name}: {checkpoint.title}"
    yield "recipes", ", ".join(checkpoint_card.read_by(checkpoint)) or "none published: give recipe= to create_model"
    yield "input", f"{checkpoint.input_size} x {checkpoint.input_size} in training, any size here"
    yield "noise", checkpoint_card.forward_process(configs["scheduler"])
    yield "conditioned", checkpoint_card.conditioning(checkpoint, configs).replace("`", "")
    yield (
        "activations",
        f"{len(family.catalogue(configs, checkpoint.name).all())}: diffusion-backbones activations {checkpoint.name} "
        "--all",
    )
    yield "parameters", checkpoint_card.parameters(cost)
    yield (
        "to read",
        f"{backbone_card.memory(cost)} for the whole network; a recipe reads what is in front of its last activation",
    )
    yield from _weights(checkpoint)
    yield from _sentences("notes", [checkpoint.status] if checkpoint.status else [])
    yield from _sentences("unverified", _doubts(checkpoint))


def _doubts(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.unverified, *([] if checkpoint.license.verified else ["No source at hand states the licence."])]


def _what(declaration: Declaration) -> Iterator[tuple[str, str]]:
    recipe = declaration.recipe
    paper = f" of {backbone_card.cite(recipe.paper)}, {recipe.paper.link}" if recipe.paper else ""
    yield "backbone", f"{declaration.name}: {declaration.checkpoint.title}, read by {recipe.name}{paper}"


def _levels(declaration: Declaration) -> Iterator[tuple[str, str]]:
    for i, level in enumerate(backbone_card.levels(declaration)):
        first = f"{i}: {sum(site.channels for site in level)} @ {level[0].stride}"
        for j, site in enumerate(level):
            yield "" if i or j else "levels", f"{'' if j else first:14}{site.id}"


def _recipe(declaration: Declaration) -> Iterator[tuple[str, str]]:
    recipe, side = declaration.recipe, declaration.input_size
    counted = "" if recipe.nominal_timestep is None else f", which the source counts as {recipe.nominal_timestep}"
    seed = f", seed {recipe.seed}" if recipe.noise == "fixed" else ""
    mean = f", mean of {recipe.ensemble} draws" if recipe.ensemble > 1 else ""
    yield "input", f"{side} x {side} in the source, any size here"
    yield "timestep", f"{recipe.timestep:g}{counted}"
    yield "noise", f"{recipe.noise}{seed}{mean}"
    yield "prompt", repr(recipe.prompt) if recipe.prompt else "empty"
    if backbone_card.postop(recipe):
        yield "afterwards", backbone_card.postop(recipe)


def _costs(declaration: Declaration) -> Iterator[tuple[str, str]]:
    cost, ensemble = costs(declaration), declaration.recipe.ensemble
    draws = f"{ensemble} x " if ensemble > 1 else ""
    kept, whole, encoder = (
        backbone_card.millions(n) for n in (cost.parameters, cost.parameters_total, cost.encoder_parameters)
    )
    operations = (
        f"denoiser {draws}{backbone_card.gflops(cost.denoiser_gflops)} GFLOPs, image encoder "
        f"{backbone_card.gflops(cost.encoder_gflops)} GFLOPs"
    )
    yield "parameters", f"denoiser {kept} kept of {whole}, image encoder {encoder}"
    yield "operations", f"{operations}, for one image of {cost.size} x {cost.size}"
    if cost.tiny_encoder_gflops:
        yield (
            "",
            f"with encoder='tiny': image encoder {backbone_card.gflops(cost.tiny_encoder_gflops)} GFLOPs, "
            f"{backbone_card.millions(cost.tiny_encoder_parameters)}",
        )
    yield "to read", backbone_card.memory(cost)


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    yield "weights", f"{checkpoint.hub_id} @ {checkpoint.revision}" if checkpoint.hub_id else "in the package"
    if checkpoint.denoiser:
        yield (
            "",
            f"denoiser: {checkpoint.denoiser.repo} @ {checkpoint.denoiser.revision}, {checkpoint.denoiser.filename}",
        )
    for mirror in checkpoint.mirrors:
        yield "", f"mirror: {mirror}"
    yield (
        "access",
        access(checkpoint)
        + (f": accept the licence at https://huggingface.co/{checkpoint.hub_id}" if checkpoint.gated else ""),
    )
    yield "licence", " ".join(filter(None, [str(checkpoint.license), checkpoint.license.link]))


def _sentences(heading: str, sentences: list[str]) -> Iterator[tuple[str, str]]:
    for i, sentence in enumerate(sentences):
        yield "" if i else heading, sentence
