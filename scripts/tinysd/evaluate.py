"""What the features of tinysd are worth, on drawn scenes and on photographs, each with a 95 % interval.

    python scripts/tinysd/evaluate.py [--photographs DATA] [--weights FOLDER] [--resnet open-nsfw.onnx] [--csv FILE]
        [--only TASK] [FEATURES ...]

``drawn_tasks.py``, ``photo_tasks.py`` and ``propagation.py`` say exactly what is done. DATA is no part of this
repository; without it the tasks on drawn scenes run alone. Artwork of the drawn scenes is fetched by ``sprites.py``.

Beside the recipes on ``tinysd`` and single activations of it stand ``position`` alone, ``color`` with position (for
matching: patches of 17 x 17 pixels), ``untrained``, the mean of three networks of ``tinysd_gdf`` with random weights,
and ``resnet``, a network for photographs. The bootstrap of an interval draws images, pairs or sequences.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable
from pathlib import Path

import drawn_tasks
import photo_tasks
import propagation
from intervals import Outcome, figure
from photo_features import BASELINES, SINGLE, Features, features

import diffusion_backbones as db
from diffusion_backbones.evaluation.scenes import load_scenes

SEEDS = (0, 1, 2)
DRAWN = ("probe", "keypoints")
PHOTOGRAPHS = {
    "camvid": photo_tasks.camvid,
    "willow": photo_tasks.willow,
    "classes": photo_tasks.classes,
    "davis": propagation.davis,
}
Task = Callable[[Features], dict[str, Outcome]]


def tasks(args: argparse.Namespace) -> dict[str, Task]:
    """Those that were asked for, with their data."""
    wanted = args.only or [*DRAWN, *(PHOTOGRAPHS if args.photographs else ())]
    if not args.photographs and (missing := [task for task in wanted if task in PHOTOGRAPHS]):
        raise SystemExit(f"{missing[0]} needs --photographs DATA.")
    found: dict[str, Task] = {}
    if set(DRAWN) & set(wanted):
        data = load_scenes()
        found["keypoints"] = functools.partial(drawn_tasks.keypoints, data)
    if "probe" in wanted:
        drawn = drawn_tasks.draw(drawn_tasks.artwork(args.artwork))
        found["probe"] = functools.partial(drawn_tasks.probe, drawn, data)
    for name, task in PHOTOGRAPHS.items():
        found[name] = functools.partial(task, args.photographs, most=args.most)
    return {name: found[name] for name in wanted}


def measure(name: str, wanted: dict[str, Task], weights: Path | None, resnet: Path | None) -> list[dict[str, str]]:
    """A row for every metric."""
    seeds = SEEDS if name == "untrained" else SEEDS[:1]
    found: dict[str, list[Outcome]] = {}
    for seed in seeds:
        competitor = features(name, seed, weights, resnet)
        for task in wanted.values():
            for metric, outcome in task(competitor).items():
                found.setdefault(metric, []).append(outcome)
    rows = []
    for metric, outcomes in found.items():
        value, low, high = (f"{number:.1f}" for number in figure(outcomes))
        units = str(len(outcomes[0].units))
        rows.append({"features": name, "metric": metric, "value": value, "low": low, "high": high, "units": units})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tinysd = db.list_models("tinysd_*")
    parser.add_argument("features", nargs="*", metavar="FEATURES", help="default: all that are named above")
    parser.add_argument("--only", action="append", choices=(*DRAWN, *PHOTOGRAPHS), help="may be given several times")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--photographs", type=Path, metavar="DATA", help="measure on photographs too")
    parser.add_argument("--artwork", type=Path, default=Path("build/tinysd"), help="folder of sprites.py")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of tinysd (default those in the package)")
    parser.add_argument("--resnet", type=Path, metavar="ONNX", help="open-nsfw.onnx, for the features resnet")
    parser.add_argument("--most", type=int, metavar="N", help="try it on N photographs of a split, groups or sequences")
    args = parser.parse_args()
    baselines = [name for name in BASELINES if args.resnet or name != "resnet"]
    wanted, rows = tasks(args), []
    for name in args.features or [*baselines, *tinysd, *SINGLE]:
        measured = measure(name, wanted, args.weights, args.resnet)
        for row in measured:
            print(f"{name:36} {row['metric']:28} {row['value']:>5} [{row['low']}, {row['high']}]", flush=True)
        rows += measured
        if args.csv:
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
