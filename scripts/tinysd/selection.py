"""What choosing activations is worth on tinysd: the figures of docs/selection.md.

    python scripts/tinysd/selection.py truth chosen properties -o build/selection

``truth``: all activations compared, against those that the paper's filter keeps, by mIoU and by PCK, and the seconds of
both. ``chosen``: recipes that the method chooses with no more channels than ``gdf``, ``legacy`` and ``dift`` have, on
scenes that neither the choice nor the probe has seen; the probe is that of ``evaluate.py``. Beside the filter's choice
stands one from all activations. ``properties``: every activation's properties in the trained network and in random ones
of its shape; also a picture.

Each prints its table and writes it as a CSV. Seeds are 0, 1 and 2: of images' noise and splits, and of the random
weights.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import drawn_tasks
import numpy as np
import torch
from evaluate import SEEDS
from intervals import Outcome
from photo_features import Features, features
from tqdm import tqdm

import diffusion_backbones as db
from diffusion_backbones.evaluation.scenes import load_scenes
from diffusion_backbones.selection import data, rules, run
from diffusion_backbones.selection.compare import FeatureCache, single_scores
from diffusion_backbones.selection.measure import Measured, candidates, measure
from diffusion_backbones.selection.rules import MEASURED
from diffusion_backbones.selection.tasks import Task

MEASURED_ON, SIZE, TIMESTEP = 24, 256, 51
BASELINES = ("gdf", "legacy", "dift")
SHOWN = ("noise", "noise_low", "position", "xy", "locality", "granularity")
Row = dict[str, Any]


def network(seed: int | None = None) -> db.DiffusionBackbone:
    """All of tinysd; with a seed, a random network of its shape."""
    if seed is None:
        return db.create_model("tinysd", pretrained=True, recipe=["unet-out"], timestep=TIMESTEP)
    torch.manual_seed(seed)
    return db.create_model("tinysd", recipe=["unet-out"], timestep=TIMESTEP)


def ids_of(backbone: db.DiffusionBackbone) -> list[str]:
    return [site.id for site in candidates(backbone.catalogue[activation] for activation in backbone.catalogue)]


def measured(backbone: db.DiffusionBackbone, seed: int) -> Measured:
    images = data.scenes(SIZE, "masks", seed).images[:MEASURED_ON]
    return measure(
        backbone,
        images,
        ids_of(backbone),
        seed=seed,
        progress=lambda x: tqdm(x, "measuring", leave=False, mininterval=5),
    )


def compared(backbone: db.DiffusionBackbone, task: Task, ids: Sequence[str]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), {})
        cache.gather(backbone, task, ids)
        return single_scores(
            task, cache, ids, lambda x: tqdm(x, f"{task.metric}, {len(ids)}", leave=False, mininterval=5)
        )


def truth() -> list[Row]:
    """The ten best of all, and how many the filter keeps."""
    backbone, rows = network(), []
    ids = ids_of(backbone)
    for seed in SEEDS:
        began = time.perf_counter()
        dropped = rules.apply(rules.load(), measured(backbone, seed).properties)
        measuring = time.perf_counter() - began
        kept = [activation for activation in ids if not dropped[activation]]
        for task in (data.scenes(SIZE, name, seed).task for name in ("masks", "keypoints")):
            began = time.perf_counter()
            compared(backbone, task, kept)
            between = time.perf_counter()
            mean = {activation: float(score.mean()) for activation, score in compared(backbone, task, ids).items()}
            ended = time.perf_counter()
            best = sorted(ids, key=lambda activation, mean=mean: -mean[activation])
            rows.append(
                {
                    "seed": seed,
                    "task": task.metric,
                    "activations": len(ids),
                    "kept": len(kept),
                    "kept of the best 10": sum(not dropped[activation] for activation in best[:10]),
                    "best of all": mean[best[0]],
                    "best kept": max(mean[activation] for activation in kept),
                    "median of all": statistics.median(mean.values()),
                    "median of the kept": statistics.median(mean[activation] for activation in kept),
                    "seconds, filter and comparison": measuring + between - began,
                    "seconds, full comparison": ended - between,
                    "the best 10": " ".join(best[:10]),
                }
            )
            show(rows[-1:])
    return rows


def chosen(baselines: Sequence[str], artwork: Path) -> list[Row]:
    """The method's recipes and the published ones, on held-out scenes."""
    scenes, rows = load_scenes(), []
    drawn = drawn_tasks.draw(drawn_tasks.artwork(artwork))
    tasks = (functools.partial(drawn_tasks.probe, drawn, scenes), functools.partial(drawn_tasks.keypoints, scenes))
    for baseline in baselines:
        name = f"tinysd_{baseline}"
        channels = sum(db.create_model(name, device="meta").feature_info.channels())
        rows.append(judge(name, name, channels, "", tasks))
        show(rows[-1:])
        for everything in (False, True) if baseline == "gdf" else (False,):
            found = []
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as folder:
                    keep = [rule for rule in rules.load() if not everything]
                    images = data.scenes(SIZE, "masks", seed)
                    selection = run.select(
                        "tinysd", images, Path(folder), timestep=TIMESTEP, rules=keep, channels=channels, seed=seed
                    )
                    taken = " + ".join(selection.recipe.ids)
                    width = sum(site.channels for site in selection.sites if site.id in selection.recipe.ids)
                    found.append(judge(str(Path(folder) / "recipe.yaml"), "", width, taken, tasks))
            label = f"chosen {'from all' if everything else 'behind the filter'}, as wide as {baseline}"
            numbers = {
                key: [value for row in found for value in row[key]]
                for key in found[0]
                if isinstance(found[0][key], list)
            }
            rows.append(
                {
                    "recipe": label,
                    "channels": [row["channels"] for row in found],
                    **numbers,
                    "ids": " | ".join(row["ids"] for row in found),
                }
            )
            show(rows[-1:])
    return rows


def judge(
    name: str, label: str, channels: int, ids: str, tasks: Sequence[Callable[[Features], dict[str, Outcome]]]
) -> Row:
    """mIoU and PCK, by split that nothing was chosen on."""
    judged, row = features(name, 0), {"recipe": label, "channels": channels}
    for task in tasks:
        row |= {metric: [outcome.score(outcome.units)] for metric, outcome in task(judged).items()}
    return row | {"ids": ids}


def properties() -> list[Row]:
    """Of the trained network and of random ones."""
    return [
        {"network": kind, "seed": seed, "id": activation, **{name: getattr(found, name) for name in MEASURED}}
        for kind in ("trained", "random")
        for seed in SEEDS
        for activation, found in measured(network(None if kind == "trained" else seed), seed).properties.items()
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each property against forward order: mean over seeds, and from the least to the most."""
    from matplotlib.figure import Figure

    ids = list(dict.fromkeys(row["id"] for row in rows))
    stages = [activation.partition("-")[0] for activation in ids]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, SHOWN, strict=True):
        for kind, colour in (("trained", "#0550ae"), ("random", "#afb8c1")):
            values = np.array(
                [[row[name] for row in rows if row["network"] == kind and row["seed"] == seed] for seed in SEEDS]
            )
            axes.fill_between(range(len(ids)), values.min(0), values.max(0), color=colour, alpha=0.3, linewidth=0)
            axes.plot(
                values.mean(0),
                ".",
                markersize=4,
                color=colour,
                label={"trained": "tinysd", "random": "random weights"}[kind],
            )
        for stage in ("down", "mid", "up"):
            axes.axvline(stages.index(stage) - 0.5, color="#d8dee4", linewidth=1)
        axes.set_xticks([stages.index(s) + stages.count(s) / 2 for s in ("down", "mid", "up")], ["down", "mid", "up"])
        axes.tick_params(axis="x", length=0)
        axes.set_title(f"{name}{', pixels' if name == 'granularity' else ''}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "xy":
            axes.set_ylim(-1, 1)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def show(rows: Sequence[Row]) -> None:
    """For the terminal: means and standard deviations where there are several values."""
    for row in rows:
        print(", ".join(f"{key} {text(value)}" for key, value in row.items() if value != ""), flush=True)


def text(value: Any) -> str:
    if isinstance(value, list) and len(value) > 1:
        return f"{statistics.fmean(value):.1f} ± {statistics.stdev(value):.1f}"
    (value,) = value if isinstance(value, list) else [value]
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["truth", "chosen", "properties"])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the CSVs and the picture")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=BASELINES, help="for chosen")
    parser.add_argument("--artwork", type=Path, default=Path("build/tinysd"), help="folder of sprites.py, for chosen")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        rows = (
            chosen(args.baselines, args.artwork)
            if part == "chosen"
            else {"truth": truth, "properties": properties}[part]()
        )
        with (args.out / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {key: f"{value:.4g}" if isinstance(value, float) else text(value) for key, value in row.items()}
                for row in rows
            )
        if part == "properties":
            draw(rows, args.out / "properties.png")


if __name__ == "__main__":
    main()
