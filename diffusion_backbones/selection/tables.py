"""The files of a selection that programs read: the recipe, its card, and the tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusion_backbones.ops import atomic
from diffusion_backbones.reports import backbone_card
from diffusion_backbones.selection.result import Selection
from diffusion_backbones.selection.rules import MEASURED


def write(selection: Selection, out: Path) -> None:
    """Write the recipe, its card and the tables to the folder ``out``."""
    with atomic.replacing(out / "recipe.yaml") as part:
        selection.recipe.to_yaml(part)
    load = f'db.create_model({selection.arguments}, recipe="recipe.yaml")'
    atomic.write_text(out / "card.md", backbone_card.card(selection.declaration, selection.configs, load))
    _write_csv(out / "activations.csv", _activations(selection))
    _write_csv(out / "curves.csv", _curves(selection))
    _write_csv(out / "redundancy.csv", _redundancy(selection))


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with atomic.replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _activations(selection: Selection) -> Iterable[Sequence[Any]]:
    """Every activation: what it is, its cost, its properties, why it was dropped, its score."""
    chosen = {step.id: i + 1 for i, step in enumerate(selection.steps)}
    about = ("id", "module", "channels", "stride", "gflops", "parameters", "bytes")
    yield [*about, *MEASURED, "dropped", selection.metric, "spread", "chosen"]
    for site in selection.sites:
        cost, score = selection.prefix_costs[site.id], selection.scores.get(site.id)
        known = [site.id, site.path, site.channels, site.stride]
        costs = [f"{cost.gflops:.2f}", cost.parameters, 4 * cost.parameters]
        properties = [f"{getattr(selection.measured.properties[site.id], name):.4g}" for name in MEASURED]
        scored = ["", ""] if score is None else [f"{score.mean():.2f}", f"{score.std(ddof=1):.2f}"]
        yield [*known, *costs, *properties, selection.dropped[site.id], *scored, chosen.get(site.id, "")]


def _curves(selection: Selection) -> Iterable[Sequence[Any]]:
    """The noise of each by octave of frequency, and the similarity of two places by their distance."""
    yield ["id", "curve", "at", "value"]
    for site in selection.sites:
        found = selection.measured.properties[site.id]
        for at, value in found.noise_curve:
            yield [site.id, "noise, from cycles per image", f"{at:g}", f"{value:.4g}"]
        for at, value in found.similarity:
            yield [site.id, "similarity, at pixels", f"{at:g}", f"{value:.4g}"]


def _redundancy(selection: Selection) -> Iterable[Sequence[Any]]:
    """The linear CKA of every two activations."""
    ids = [site.id for site in selection.sites]
    yield ["", *ids]
    for name, row in zip(ids, selection.measured.redundancy.tolist(), strict=True):
        yield [name, *(f"{value:.3f}" for value in row)]
