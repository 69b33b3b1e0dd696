"""The report of a selection: one HTML file that needs neither the internet nor other files."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_backbones import __version__
from diffusion_backbones.selection.result import Selection, number
from diffusion_backbones.selection.rules import MEASURED
from diffusion_backbones.spec.activations import Site, parse

TEMPLATE = Path(__file__).with_name("report.html")
EXPLAINED = {
    "noise": "share of the noise draw in its variance; 0 is clean",
    "noise_low": "the same below four cycles per image",
    "position": "share of the place in its variance, whatever the image shows",
    "xy": "how well x and y can be read off it (R²); 1 is perfectly",
    "locality": "how far distance alone explains which places look alike",
    "granularity": "size of what it draws, in pixels",
    "massive": "strongest channel over the median one",
    "gflops": "10⁹ operations of the denoiser up to it",
}
KINDS = ("dropped", "kept", "chosen")
LOGARITHMIC = ("granularity", "massive")
WIDTH, HEIGHT = 360, 110


@dataclass(frozen=True)
class Box:
    """A part of the network in the drawing.

    Attributes:
        title: Its name.
        row, column: Its place, from 1; 0 for networks that are one row of blocks.
        lines: Indices of its activations, one line for each residual block.
    """

    title: str
    row: int
    column: int
    lines: list[list[int]]


def boxes(sites: Sequence[Site]) -> list[Box]:
    """The stages of a network: a U of levels, or a row of blocks, in forward order."""
    parsed = [parse(site.id) for site in sites]
    depth = 1 + max((known.level or 0 for known in parsed if known.stage == "down"), default=0)
    found: dict[tuple[str, int, int], dict[Any, list[int]]] = {}
    for index, known in enumerate(parsed):
        if known.stage == "unet":
            place = ("output", 1, 2) if known.kind == "out" else ("input", 1, 1)
        elif known.stage == "mid":
            place = ("mid", depth + 2, 0)
        elif known.stage == "vit":
            place = (f"block {known.block}", 0, 0)
        else:
            assert known.level is not None  # a stage of a U-Net: candidates are never module paths
            row = known.level if known.stage == "down" else depth - 1 - known.level
            place = (f"{known.stage} level {known.level}", row + 2, 1 if known.stage == "down" else 2)
        found.setdefault(place, {}).setdefault(known.repeat, []).append(index)
    return [Box(*place, list(lines.values())) for place, lines in found.items()]


@dataclass(frozen=True)
class Plot:
    """One property of all activations against forward order, in a drawing of :data:`WIDTH` by :data:`HEIGHT`.

    Attributes:
        name, about: Name and explanation of the property.
        points: (x, y, index, class) of each activation; y grows downwards.
        low, high: Values at the bottom and at the top.
    """

    name: str
    about: str
    points: list[tuple[float, float, int, str]]
    low: float
    high: float


def plot(name: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Plot a property of the activations in ``rows``."""
    known = [row[name] for row in rows if row[name] is not None] or [0.0]
    low, high = min(known), max(known)
    scale = math.log if name in LOGARITHMIC and low > 0 else float

    def at(value: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5

    points = [
        (round((i + 0.5) / len(rows) * WIDTH, 1), round(HEIGHT * (1 - at(row[name])), 1), i, kind(row))
        for i, row in enumerate(rows) if row[name] is not None
    ]  # fmt: skip
    return Plot(name, EXPLAINED[name], sorted(points, key=lambda point: KINDS.index(point[3])), low, high)


def kind(row: Mapping[str, Any]) -> str:
    """How an activation is drawn: one of :data:`KINDS`."""
    return "chosen" if row["chosen"] else "dropped" if row["dropped"] else "kept"


def render(
    selection: Selection,
    strips: Mapping[str, Image.Image],
    photographs: Sequence[Image.Image],
    pyramid: Sequence[Image.Image],
) -> str:
    """Render the report as HTML.

    Args:
        selection: The result of :func:`~diffusion_backbones.selection.run.select`.
        strips: Id -> its picture, painted by :func:`~diffusion_backbones.selection.pictures.strip`.
        photographs: The images in the strips.
        pyramid: A strip for each level of the recipe.
    """
    from jinja2 import Environment, StrictUndefined

    rows = [{"index": i, **_row(selection, site, strips[site.id])} for i, site in enumerate(selection.sites)]
    scored = sorted((row for row in rows if row["score"] is not None), key=lambda row: -float(row["score"]))
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["dropped"]:
            reasons.setdefault(row["dropped"].partition(":")[0], []).append(row)
    groups = boxes(selection.sites)
    redundancy = bytes(int(min(max(value, 0), 1) * 255) for value in selection.measured.redundancy.flatten().tolist())
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"number": number, "kind": kind}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        selection=selection,
        title=selection.declaration.checkpoint.title,
        version=__version__,
        rows=rows,
        ranking=scored,
        reasons=reasons,
        rules={rule.name: rule for rule in selection.rules},
        boxes=groups,
        flat=all(box.row == 0 for box in groups),
        plots=[plot(name, rows) for name in EXPLAINED],
        width=WIDTH,
        height=HEIGHT,
        stages=_stages(selection.sites),
        levels=[
            _level(level.activations, rows, picture)
            for level, picture in zip(selection.recipe.levels, pyramid, strict=True)
        ],
        photographs=[data_uri(photo, "JPEG") for photo in photographs],
        explained=EXPLAINED,
        logarithmic=LOGARITHMIC,
        data=json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c"),  # nothing in it can end its element
        redundancy=base64.b64encode(redundancy).decode(),
    )


def data_uri(picture: Image.Image, file_format: str = "WEBP") -> str:
    """A picture as a data URI: lossless WebP, since a strip has few pixels, or JPEG for photographs."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **({"lossless": True} if file_format == "WEBP" else {"quality": 88}))
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _row(selection: Selection, site: Site, picture: Image.Image) -> dict[str, Any]:
    score, cost = selection.scores.get(site.id), selection.prefix_costs[site.id]
    found = selection.measured.properties[site.id]
    measured = {name: getattr(found, name) for name in MEASURED}
    return {
        "id": site.id,
        "module": site.path,
        "channels": site.channels,
        "stride": site.stride,
        "gflops": cost.gflops,
        "parameters": cost.parameters,
        **{name: value if math.isfinite(value) else None for name, value in measured.items()},
        "dropped": selection.dropped[site.id],
        "score": None if score is None else float(score.mean()),
        "spread": None if score is None else float(score.std(ddof=1)),
        "chosen": next((i + 1 for i, step in enumerate(selection.steps) if step.id == site.id), 0),
        "picture": data_uri(picture),
        "noise_curve": _curve(found.noise_curve),
        "similarity": _curve(found.similarity),
    }


def _stages(sites: Sequence[Site]) -> list[tuple[str, float, float]]:
    """(name, begin, end) of each stage along a plot; none for a network that has only one."""
    names = [parse(site.id).stage for site in sites]
    if len(set(names)) == 1:
        return []
    begins = [i for i, name in enumerate(names) if name in ("down", "mid", "up") and name != names[i - 1]]
    ends = [next((j for j in range(i, len(names)) if names[j] != names[i]), len(names)) for i in begins]
    return [(names[i], i / len(names) * WIDTH, j / len(names) * WIDTH) for i, j in zip(begins, ends, strict=True)]


def _curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(at, round(value, 3)) for at, value in points]


def _level(ids: Sequence[str], rows: Sequence[Mapping[str, Any]], picture: Image.Image) -> dict[str, Any]:
    of_level = [row for row in rows if row["id"] in ids]
    return {
        "ids": ids,
        "channels": sum(row["channels"] for row in of_level),
        "stride": of_level[0]["stride"],
        "picture": data_uri(picture),
    }
