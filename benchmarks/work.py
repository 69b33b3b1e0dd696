"""Cost against work: how long a backbone takes for larger images, larger batches and more levels, and the pictures of
docs/speed.md.

    python benchmarks/work.py measure sd15_gdf [--device cuda --dtype bfloat16] [--only size|batch|levels]      #
    appends to docs/speed_work.csv python benchmarks/work.py plot
    # docs/speed_*.png, from that and speed.csv

Random weights. What takes less than five seconds is run again, ``--rounds`` times, and the least counts; of what takes
longer, the first run. Batches are at 256 pixels, levels at the backbone's own size. What does not fit is left out, and
said.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import diffusion_backbones as db
from diffusion_backbones.evaluation import benchmark, benchmark_table
from diffusion_backbones.reports import costs
from diffusion_backbones.reports.measurements import speed

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "speed_work.csv"
SIZES, BATCHES = (256, 384, 512, 768, 1024, 1536, 2048), (1, 2, 4, 8, 16, 32)


def measure(setting: benchmark.Setting, kinds: list[str], largest: int) -> None:
    backbone = setting.build()
    declaration = backbone.declaration

    def gflops(side: int, model: Any = backbone) -> float:
        levels = tuple(db.Level(tuple(site.id for site in level.sites)) for level in model.levels)
        cost = costs.measure(
            replace(declaration, recipe=replace(declaration.recipe, input_size=side, levels=levels)), backbone.configs
        )
        return cost.encoder_gflops + backbone.plan.passes * cost.denoiser_gflops

    def images(side: int, batch: int) -> torch.Tensor:
        return replace(setting, size=side, batch=batch).images()

    jobs: dict[tuple[str, int], tuple[Callable[[], Any], float]] = {}
    for side in SIZES:
        if "size" in kinds and side <= largest:
            jobs["size", side] = partial(backbone, images(side, 1)), gflops(side)
    for batch in BATCHES:
        if "batch" in kinds:
            jobs["batch", batch] = partial(backbone, images(256, batch)), batch * gflops(256)
    for count in range(1, len(backbone.levels) + 1):
        if "levels" in kinds:
            part = db.create_model(
                setting.name,
                out_indices=range(len(backbone.levels))[-count:],
                dtype=setting.dtype,
                device=setting.device,
            )
            jobs["levels", count] = partial(part, images(setting.side, 1)), gflops(setting.side, part)
    product = 0.0
    for (kind, amount), (run, work) in jobs.items():
        product = max(product, benchmark.matmul_gflops(setting.device, setting.dtype))  # a machine is slower at times
        try:
            seconds = benchmark.once(run, setting.device)
            if seconds < 5:
                seconds = min(benchmark.once(run, setting.device) for _ in range(setting.rounds))
        except (torch.OutOfMemoryError, MemoryError) as error:
            print(f"{kind} {amount} is left out: {error}")
            continue
        row = {
            "date": datetime.date.today().isoformat(),
            "hardware": benchmark_table.hardware(setting.device),
            "backbone": setting.name,
            "dtype": setting.dtype,
            "kind": kind,
            "amount": amount,
            "seconds": seconds,
            "gflops": work,
            "share_of_matmul": work / seconds / product,
            "torch": torch.__version__,
        }
        print({key: row[key] for key in ("kind", "amount", "seconds", "gflops", "share_of_matmul")}, flush=True)
        benchmark_table.write([row], TABLE)


def plot() -> None:
    """Draw what ``measure`` and ``diffusion-backbones bench --csv diffusion_backbones/reports/data/speed.csv`` have
    written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    labels = {
        "size": "side of the image in pixels, batch 1",
        "batch": "images in a call, 256 x 256",
        "levels": "levels, the coarsest first",
    }
    for axis, (kind, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for name in dict.fromkeys(row["backbone"] for row in rows):
            found = [row for row in rows if row["kind"] == kind and row["backbone"] == name]
            amounts, seconds, work = (([float(row[key]) for row in found]) for key in ("amount", "seconds", "gflops"))
            if not found:
                continue
            axis.plot(amounts, seconds, "o-", label=name)
            axis.plot(amounts, [w / work[0] * seconds[0] for w in work], ":", color="grey", label="as operations grow")
        axis.set(xlabel=label, ylabel="seconds", **({} if kind == "levels" else {"xscale": "log", "yscale": "log"}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(amounts, [f"{amount:g}" for amount in amounts], fontsize=8)
        if kind == "levels":
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        else:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "speed_work.png", dpi=110)

    timed = [row for row in speed() if row["encoder_seconds"]]
    if not timed:
        return
    names = [
        f"{row['backbone']} {row['options']}\n{row['batch']} x {row['size']} px, {row['dtype']}, "
        f"{row['hardware'].partition(',')[0]}"
        for row in timed
    ]
    figure = Figure(figsize=(9, 0.8 + 0.5 * len(timed)), layout="constrained")
    axis, left = figure.subplots(), [0.0] * len(timed)
    parts = [
        [float(row[key]) / float(row["parts_seconds"]) for key in ("encoder_seconds", "denoiser_seconds")]
        for row in timed
    ]
    for label, shares in zip(
        ("image encoder", "denoiser", "the rest"), zip(*((e, d, 1 - e - d) for e, d in parts), strict=True), strict=True
    ):
        axis.barh(names, shares, left=left, label=label)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set(xlabel="share of the time of a call", xlim=(0, 1))
    axis.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(ROOT / "docs" / "speed_parts.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("name")
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--dtype", default="float32")
    measuring.add_argument("--rounds", type=int, default=1)
    measuring.add_argument("--largest", type=int, default=SIZES[-1], help="largest side in pixels")
    measuring.add_argument("--only", choices=("size", "batch", "levels"), action="append")
    verbs.add_parser("plot")
    args = parser.parse_args()
    if args.verb == "plot":
        plot()
    else:
        setting = benchmark.Setting(args.name, args.device, args.dtype, rounds=args.rounds)
        measure(setting, args.only or ["size", "batch", "levels"], args.largest)


if __name__ == "__main__":
    main()
