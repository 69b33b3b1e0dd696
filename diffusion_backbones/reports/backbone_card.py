"""Model cards, written from the declarations, ``costs.json`` and ``results.csv`` alone. Nothing here needs torch."""

from __future__ import annotations

import csv
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.families.image_encoders import DistilledEncoder
from diffusion_backbones.reports.costs import Costs, costs
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.checkpoint import Checkpoint, Paper, TinyEncoder
from diffusion_backbones.spec.configs import Config, Configs, left_out, package_configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.schedule import noise_level

RESULTS = Path(__file__).with_name("data") / "results.csv"
SPEED = Path(__file__).with_name("data") / "speed.csv"
"""What ``diffusion-backbones bench --csv`` measured."""
DEVIATIONS = Path(__file__).with_name("data") / "deviations.csv"
HUB = "https://huggingface.co"


def card(declaration: Declaration, saved: Configs | None = None, how: str = "") -> str:
    """A backbone's model card: YAML front matter that the Hugging Face hub reads, then Markdown.

    Args:
        declaration: A backbone, registered or not.
        saved: For the card of a folder that ``save_pretrained`` wrote: the architecture of what is in it. The usage
            then loads that folder instead of the published weights.
        how: Other words for the usage, a template as :data:`USAGE` is.

    Raises:
        ValueError: The package does not have the architecture, and ``saved`` does not give it.
    """
    configs = saved or package_configs(declaration.checkpoint)
    if not configs:
        raise ValueError(
            f"the package has no architecture for {declaration.checkpoint.name}; give the configs of what was saved: "
            "card(declaration, configs)"
        )
    maps, size, cost = levels(declaration, configs), declaration.input_size, costs(declaration, configs)
    sections = [
        f"# {declaration.name}\n\n{summary(declaration, maps)}",
        section("Levels", _levels(maps, size)),
        section("Details", _details(declaration, configs, cost)),
        section("Tiny encoder", _tiny_encoder(declaration, configs, cost)),
        section("Usage", usage(how or (USAGE_OF_FOLDER if saved else USAGE), declaration, maps)),
        section("Published results", _results(declaration)),
        section("Speed", _speed(declaration)),
        section("Notes", bullets(declaration.recipe.notes)),
        section("Not verified", bullets((*declaration.checkpoint.unverified, *declaration.recipe.unverified))),
        section("Licence", license(declaration.checkpoint)),
        section("Citation", citation(declaration.recipe.paper, declaration.checkpoint.paper)),
    ]
    return document(front_matter(declaration.checkpoint, declaration.recipe.name), sections)


def document(front: dict[str, Any], sections: Iterable[str]) -> str:
    """Front matter and the sections that are not empty."""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
        + "\n\n".join(filter(None, sections))
        + "\n"
    )


def front_matter(checkpoint: Checkpoint, *tags: str) -> dict[str, Any]:
    """What the hub reads. There is no model-index: no number was measured with these weights by this package."""
    license = checkpoint.license
    front: dict[str, Any] = {
        "library_name": "diffusion_backbones",
        "pipeline_tag": "image-feature-extraction",
        "license": license.id,
    }
    if license.id == "other":
        front["license_name"] = re.sub(r"[^a-z0-9.-]+", "-", license.name.lower()).strip("-")
        if license.link:
            front["license_link"] = license.link
    if checkpoint.hub_id:
        front["base_model"] = (
            [checkpoint.denoiser.repo, checkpoint.hub_id] if checkpoint.denoiser else checkpoint.hub_id
        )
    front["tags"] = ["image-feature-extraction", "diffusion", "feature-pyramid", checkpoint.family, *tags]
    return front


# What a card, a table and a hub entry say about a backbone.


def levels(declaration: Declaration, configs: Configs | None = None) -> list[tuple[Site, ...]]:
    """The sites of every level, fine to coarse; those of one level share a stride and are concatenated along channels."""
    checkpoint = declaration.checkpoint
    configs = configs or package_configs(checkpoint)
    catalogue = FAMILIES[checkpoint.family].activations(configs, checkpoint.name)
    catalogue = catalogue.with_probe(functools.partial(_probe, checkpoint.family, configs))
    return FAMILIES[checkpoint.family].levels(
        left_out(configs, declaration.recipe.without), declaration.recipe, catalogue
    )


def _probe(family: str, configs: Configs, path: str) -> Site:
    from diffusion_backbones.surgery import introspection  # needs torch, and is only for module paths that no id names

    return introspection.site(family, configs, path)


def channels_at_strides(maps: Iterable[Sequence[Site]]) -> str:
    """``320@8 · 640@16 · 2560@32``: channels and stride in pixels of every map."""
    return " · ".join(f"{sum(site.channels for site in level)}@{level[0].stride}" for level in maps)


def shapes(maps: Iterable[Sequence[Site]], size: int) -> list[tuple[int, int, int, int]]:
    """Shape (1, C, h, w) of every map of one square image of ``size`` pixels."""
    return [
        (1, sum(site.channels for site in level), side, side)
        for level in maps
        for side in (-(-size // level[0].stride),)
    ]


def summary(declaration: Declaration, maps: Sequence[Sequence[Site]]) -> str:
    """Two or three sentences."""
    checkpoint, recipe = declaration.checkpoint, declaration.recipe
    chosen = (
        f"the recipe `{recipe.name}` of [{cite(recipe.paper)}]({recipe.paper.link})"
        if recipe.paper
        else f"the unpublished recipe `{recipe.name}`"
    )
    count = f"{len(maps)} feature map{'s' * (len(maps) > 1)}"
    return (
        f"{checkpoint.title}, frozen and read by {chosen}: an image in, {count} out ({channels_at_strides(maps)}, "
        "channels at stride)."
    )


def cite(paper: Paper) -> str:
    """``Meng et al. 2024``."""
    first, *others = paper.authors.split(" and ")
    return f"{first.partition(',')[0]}{' et al.' if others else ''} {paper.year}"


def millions(number: int) -> str:
    return f"{number / 1e6:,.0f} M" if number >= 1e7 else f"{number / 1e6:.2f} M"


def gflops(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2f}"


# Sections.


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {sentence}" for sentence in sentences)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _levels(maps: Sequence[Sequence[Site]], size: int) -> str:
    rows = []
    for index, level in enumerate(maps):
        shape = " × ".join(map(str, shapes([level], size)[0][1:]))
        for part, site in enumerate(level):
            first = [str(index), str(site.stride), shape] if part == 0 else ["", "", ""]
            rows.append([*first, f"`{site.id}`", str(site.channels), f"`{site.path}`"])
    joined = (
        "\n\nActivations of one level are concatenated along channels in this order."
        if any(len(level) > 1 for level in maps)
        else ""
    )
    return (
        table(["level", "stride", f"shape at {size} × {size}", "activation", "channels", "module in diffusers"], rows)
        + joined
    )


def _details(declaration: Declaration, configs: Configs, cost: Costs) -> str:
    checkpoint, recipe, size = declaration.checkpoint, declaration.recipe, declaration.input_size
    family = FAMILIES[checkpoint.family]
    counted = f", which the source counts as {recipe.nominal_timestep}" if recipe.nominal_timestep is not None else ""
    padding = "padded to the text encoder's limit" if recipe.prompt_padding == "max_length" else "not padded"
    unprompted = CLASS if "class_labels" in family.conditioning_shapes(configs) else "none"
    texts = family.text_encoder_names(left_out(configs, recipe.without))
    kept = f"{millions(cost.parameters)} of {millions(cost.parameters_total)}"
    draws = f"{recipe.ensemble} × " if recipe.ensemble > 1 else ""
    compute = (
        f"denoiser {draws}{gflops(cost.denoiser_gflops)} GFLOPs, image encoder {gflops(cost.encoder_gflops)} GFLOPs"
    )
    rows = [
        ("Weights", weights(checkpoint)),
        ("Input", accepts(checkpoint, configs)),
        ("Default size", f"{size} × {size} pixels, in `pretrained_cfg` for timm's transforms"),
        ("Timestep", f"{recipe.timestep:g}{', before the first step' if recipe.timestep < 0 else counted}"),
        ("Noise", _noise(declaration, configs["scheduler"])),
        ("Prompt", f"{repr(recipe.prompt) if recipe.prompt else 'empty'}, {padding}" if texts else unprompted),
        *([("Left out", ", ".join(recipe.without))] if recipe.without else []),
        *([("Afterwards", postop(recipe))] if postop(recipe) else []),
        ("Latents", latents(checkpoint, configs, recipe.scaled)),
        (
            "Parameters",
            f"denoiser {kept}, cut behind the last activation; image encoder {millions(cost.encoder_parameters)}",
        ),
        ("Compute", f"{compute}, for one image of {cost.size} × {cost.size}; a multiply-add counts as two"),
        ("Size in memory", memory(cost)),
    ]
    if checkpoint.tiny_encoder and _in_place(declaration, configs):
        rows.append(("Image encoder", f"{_named(checkpoint.tiny_encoder)}, in place of the checkpoint's own"))
    if not checkpoint.encoder_float16:
        rows.append(("float16", OVERFLOWS))
    if recipe.source:
        rows.append(("Source of the recipe", recipe.source))
    return table(["", ""], rows)


def weights(checkpoint: Checkpoint) -> str:
    """Where the weights are."""
    if not checkpoint.hub_id:
        return ". ".join(filter(None, ["in the package", checkpoint.status]))
    base = f"[{checkpoint.hub_id}]({HUB}/{checkpoint.hub_id})" + (
        f" at `{checkpoint.revision[:12]}`" if checkpoint.revision != "main" else ""
    )
    file = checkpoint.denoiser
    text = f"denoiser from [{file.repo}]({HUB}/{file.repo}) (`{file.filename}`), the rest from {base}" if file else base
    mirrors = ", ".join(f"[{mirror}]({HUB}/{mirror})" for mirror in checkpoint.mirrors)
    return ". ".join(
        filter(
            None, [text, f"Mirrors, tried in this order: {mirrors}" if mirrors else "", checkpoint.status.rstrip(".")]
        )
    )


def _noise(declaration: Declaration, scheduler: Config) -> str:
    recipe = declaration.recipe
    if recipe.noise == "none":
        return "none: z_t = z"
    alpha, sigma = noise_level(scheduler, recipe.timestep)
    formula = f"z_t = {alpha:.4f} z + {sigma:.4f} noise"
    drawn = f"one fixed canvas, seed {recipe.seed}" if recipe.noise == "fixed" else "drawn anew in every call"
    if recipe.ensemble > 1:
        fixed = f"fixed canvases, seeds {recipe.seed} to {recipe.seed + recipe.ensemble - 1}"
        drawn = (
            f"activations averaged over {recipe.ensemble} "
            f"{fixed if recipe.noise == 'fixed' else 'draws, new in every call'}"
        )
    return f"{formula}; {drawn}"


def accepts(checkpoint: Checkpoint, configs: Configs) -> str:
    """What an image must be."""
    divisor = FAMILIES[checkpoint.family].size_divisibility(configs)
    return f"(B, 3, H, W), RGB in [-1, 1], any height and width, padded inside to multiples of {divisor}"


def latents(checkpoint: Checkpoint, configs: Configs, scaled: bool = True) -> str:
    """What an image becomes before noise is added."""
    family = FAMILIES[checkpoint.family]
    shift, factor = family.image_encoder(configs).scaling(family.encoder_config(configs))
    moved = (
        f"{f'less {shift:g}, ' if shift else ''}multiplied by {factor:g}"
        if (shift, factor) != (0, 1)
        else "as they are"
    )
    where = f"{family.latent_channels(configs)} channels at stride {family.latent_stride(configs)}"
    return f"{where}, {family.image_encoder(configs).reading}, {moved if scaled else 'not scaled'}"


def memory(cost: Costs) -> str:
    """What the weights that are kept take."""
    return f"{cost.bytes / 1e9:.2f} GB in float32" if cost.bytes >= 1e8 else f"{cost.bytes / 1e6:.1f} MB in float32"


OVERFLOWS = "the image encoder overflows in float16 and stays in float32"
CLASS = "none; the network is given no class, unless a call says `class_labels=`"
POST = {
    "layer": "LayerNorm over channels",
    "adaptive": "LayerNorm over channels, with the shift and scale that the next block of the network gives it",
}


def postop(recipe: Recipe) -> str:
    """What is done to the activations behind the network, empty for nothing."""
    dropped = f"channels {', '.join(map(str, recipe.discard))} set to zero" if recipe.discard else ""
    return "; ".join(filter(None, [dropped, POST.get(recipe.normalise, "")]))


USAGE = """```python
import torch
import diffusion_backbones as db

backbone = db.create_model("{name}", pretrained=True)     # frozen, in eval mode
images = torch.rand(1, 3, {size}, {size}) * 2 - 1     # RGB in [-1, 1]
for level in backbone(images):
    print(tuple(level.shape))
{shapes}
```

Through `torch.hub`, in a clone of the repository:

```python
import torch

backbone = torch.hub.load(".", "{name}", source="local", pretrained=True)
print(backbone.feature_info.channels(), backbone.feature_info.reduction())
# {channels} {strides}
```

Through timm:

```python
import timm
import diffusion_backbones     # puts its names into timm's registry

backbone = timm.create_model("{name}", pretrained=True, features_only=True)
print(backbone.feature_info.channels(), backbone.feature_info.reduction())
# {channels} {strides}
```

As a backbone of transformers, for UperNet, Mask2Former and others (`model.backbone = backbone`):

```python
import torch
from transformers import TimmBackbone
import diffusion_backbones

backbone = TimmBackbone.from_pretrained("{name}", out_indices={indices})
images = torch.rand(1, 3, {size}, {size}) * 2 - 1
for level in backbone(images).feature_maps:
    print(tuple(level.shape))
{shapes}
```"""

USAGE_OF_FOLDER = """```python
import torch
import diffusion_backbones as db

backbone = db.create_model("local-dir:FOLDER")     # or "hf-hub:OWNER/REPOSITORY"
images = torch.rand(1, 3, {size}, {size}) * 2 - 1     # RGB in [-1, 1]
for level in backbone(images):
    print(tuple(level.shape))
{shapes}
```"""


USAGE_OF_RECIPE = USAGE_OF_FOLDER.replace(
    'db.create_model("local-dir:FOLDER")     # or "hf-hub:OWNER/REPOSITORY"',
    'db.create_model(ARGUMENTS, recipe="recipe.yaml")',
)


def usage(template: str, declaration: Declaration, maps: Sequence[Sequence[Site]]) -> str:
    """Code blocks whose lines that start with ``# `` are what they print."""
    printed = shapes(maps, declaration.input_size)
    return template.format(
        name=declaration.name,
        size=declaration.input_size,
        shapes="\n".join(f"# {shape}" for shape in printed),
        channels=[shape[1] for shape in printed],
        strides=[level[0].stride for level in maps],
        indices=list(range(len(maps))),
    )


def entry_help(declaration: Declaration) -> str:
    """What ``torch.hub.help`` prints."""
    maps, size = levels(declaration), declaration.input_size
    return f"""{summary(declaration, maps)}

Arguments are those of diffusion_backbones.create_model, except that pretrained is True unless it is given.

>>> backbone = torch.hub.load(".", "{declaration.name}", source="local")     # in a clone of the repository
>>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, {size}, {size}) * 2 - 1)]
{shapes(maps, size)}
"""


def _tiny_encoder(declaration: Declaration, configs: Configs, cost: Costs) -> str:
    tiny = declaration.checkpoint.tiny_encoder
    if not tiny or not cost.tiny_encoder_gflops or _in_place(declaration, configs):
        return ""
    head = (
        f'`create_model("{declaration.name}", pretrained=True, encoder="tiny")` takes {_named(tiny)} in place of the '
        "image encoder: "
        f"{gflops(cost.tiny_encoder_gflops)} GFLOPs and not {gflops(cost.encoder_gflops)}. **Its features are other "
        "ones.**"
    )
    rows = deviations().get(declaration.name, [])
    if not rows:
        command = f"`diffusion-backbones compare {declaration.name} IMAGES --encoder tiny`"
        return f"{head} How far they are from the exact ones was not measured here; {command} does."
    columns = {
        "level": "level",
        "channels": "channels",
        "stride": "stride",
        "error": "relative error",
        "cosine": "cosine similarity",
    }
    measured = f"How far they are from the exact ones, on {rows[0]['images']} images (`{rows[0]['command']}`):"
    return "\n\n".join(
        [f"{head} {measured}", table(list(columns.values()), [[row[column] for column in columns] for row in rows])]
    )


def _named(tiny: TinyEncoder) -> str:
    where = f"[{tiny.file.repo}]({HUB}/{tiny.file.repo})" if tiny.file else "the one in the package"
    return f"{where} ({tiny.license})"


def _in_place(declaration: Declaration, configs: Configs) -> bool:
    """Whether the image encoder with these configs is a tiny one."""
    return isinstance(FAMILIES[declaration.checkpoint.family].image_encoder(configs), DistilledEncoder)


@functools.cache
def deviations() -> dict[str, list[dict[str, str]]]:
    """How far features with a tiny encoder are from the exact ones, by backbone, as ``diffusion-backbones compare
    --csv`` wrote it.
    """
    with DEVIATIONS.open(newline="") as file:
        return {
            name: list(group) for name, group in itertools.groupby(csv.DictReader(file), lambda row: row["backbone"])
        }


@functools.cache
def results() -> dict[str, list[dict[str, str]]]:
    """Published numbers by backbone, as ``results.csv`` has them."""
    with RESULTS.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["backbone"])
    return {name: list(group) for name, group in itertools.groupby(rows, lambda row: row["backbone"])}


def _results(declaration: Declaration) -> str:
    rows = results().get(declaration.name, [])
    if not rows:
        return ""
    caveats = list(dict.fromkeys(row["caveat"] for row in rows if row["caveat"]))
    columns = ("task", "dataset", "protocol", "metric", "value", "source")
    lines = [
        [*(row[column] for column in columns), str(caveats.index(row["caveat"]) + 1) if row["caveat"] else ""]
        for row in rows
    ]
    notes = "\n".join(f"{number}. {caveat}" for number, caveat in enumerate(caveats, 1))
    head = "As the sources print them. **None was reproduced with this package.**"
    return "\n\n".join(filter(None, [head, table([*columns, "caveat"], lines), notes]))


def _speed(declaration: Declaration) -> str:
    rows = [row for row in speed() if row["backbone"] == declaration.name]
    if not rows:
        return ""
    head = (
        "As `diffusion-backbones bench` measured it with random weights, on which speed does not depend; "
        "`docs/speed.md` says what the columns mean."
    )
    return f"{head}\n\n{speed_table(rows)}"


def speed_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of :func:`speed` as a table: milliseconds an image, how many times as fast as hooks, gigabytes, and where."""
    lines = []
    for row in rows:
        milliseconds = 1000 * float(row["seconds"]) / int(row["batch"])
        time = f"{milliseconds:,.{0 if milliseconds >= 100 else 1}f}"
        numbers = [
            time,
            f"{float(row['speed']):.2f}",
            *(_number(row[key], scale, digits) for key, scale, digits in SPEED_COLUMNS.values()),
        ]
        where = f"{row['size']} px, batch {row['batch']}, {row['dtype']}"
        lines.append(
            [
                f"`{row['backbone']}`",
                row["way"],
                row["options"] or "",
                where,
                *numbers,
                f"{row['hardware']}, torch {row['torch']}, {row['date']}",
            ]
        )
    return table(["backbone", "way", "options", "input", "ms/image", "speed", *SPEED_COLUMNS, "where"], lines)


SPEED_COLUMNS = {
    "of matmul": ("share_of_matmul", 1, 2),
    "loaded in s": ("load_seconds", 1, 1),
    "GB": ("peak_bytes", 1e-9, 2),
}
"""Heading -> column of ``speed.csv``, what it is multiplied by, digits."""


def _number(text: str, scale: float, digits: int) -> str:
    return f"{scale * float(text):.{digits}f}" if text else ""


@functools.cache
def speed() -> list[dict[str, str]]:
    """The rows of ``speed.csv``."""
    if not SPEED.is_file():
        return []
    with SPEED.open(newline="") as file:
        return list(csv.DictReader(file))


def license(checkpoint: Checkpoint) -> str:
    """What may be done with the weights, and how they are had."""
    license = checkpoint.license
    named = f"[{license}]({license.link})" if license.link else str(license)
    unconfirmed = "" if license.verified else ", which no source at hand confirms"
    sentences = [f"The weights are under {named}{unconfirmed}; the code of this package is under Apache-2.0."]
    if checkpoint.gated:
        sentences.append(
            f"Access is gated: accept the terms at {HUB}/{checkpoint.hub_id} and log in with `hf auth login` first."
        )
    elif checkpoint.hub_id:
        sentences.append("Access is not gated.")
    described = "; its own card describes them" if checkpoint.hub_id else ""
    sentences.append(
        f"The features carry the limits and biases of the checkpoint and of the images it was trained on{described}."
    )
    return " ".join(sentences)


def citation(*given: Paper | None, whom: str = "the sources of the recipe and of the weights") -> str:
    papers = dict.fromkeys(paper for paper in given if paper)
    if not papers:
        return ""
    return f"Please cite {whom}:\n\n```bibtex\n" + "\n\n".join(paper.bibtex for paper in papers) + "\n```"
