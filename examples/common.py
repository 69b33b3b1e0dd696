"""What the three examples share: their command line, the two backbones, and the drawing of curves and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch
from PIL import Image
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.evaluation.scenes import FOLDER

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLOURS = {"trained": "tab:blue", "untrained": "tab:orange"}
History = dict[str, list[tuple[int, float]]]
"""``"loss"`` and the name of a metric -> (step, value)."""


def options(doc: str, steps: int) -> argparse.Namespace:
    """The command line of an example, whose docstring is its help. Makes the output folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build") / "examples",
        metavar="DIR",
        help="where pictures are written, default %(default)s",
    )
    parser.add_argument(
        "--backbone", default="tinysd_gdf", metavar="NAME", help="any that list_models() names, default %(default)s"
    )
    parser.add_argument(
        "--steps", type=int, default=steps, metavar="N", help="optimiser steps for each backbone, default %(default)s"
    )
    parser.add_argument(
        "--scenes",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="another set in the layout of load_scenes(), default the one in the package",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of the head, the batches and the untrained weights, default %(default)s",
    )
    args = parser.parse_args()
    try:
        db.get_declaration(args.backbone)
    except KeyError as error:
        parser.error(error.args[0])
    if args.steps < 20:  # the learning rate rises over the first tenth of them
        parser.error(f"--steps must be 20 or more, got {args.steps}")
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def backbones(name: str, seed: int, **kwargs: Any) -> dict[str, db.DiffusionBackbone]:
    """The backbone with its weights, and the same network with random ones."""
    trained = db.create_model(name, pretrained=True, device=DEVICE, **kwargs)
    torch.manual_seed(seed)
    return {"trained": trained, "untrained": db.create_model(name, device=DEVICE, **kwargs)}


def pixels(backbone: db.DiffusionBackbone, images: Sequence[Image.Image]) -> Tensor:
    """Square pictures -> (N, 3, S, S) in [-1, 1], S the side that the recipe was chosen for."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    return torch.stack([transform(image) for image in images])


def median(scores: Sequence[float], count: int) -> list[int]:
    """The ``count`` places in the middle of the order by score, lowest first; of equal scores the first come first."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    start = max(0, (len(order) - count) // 2)
    return order[start : start + count]


def report(stem: Path, rows: dict[str, dict[str, float]], histories: dict[str, History]) -> None:
    """Print the numbers by row and column, and write them with the histories to ``stem``.json and the curves to
    ``stem``_curves.png.
    """
    columns = list(next(iter(rows.values())))
    print(" " * 28, *(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:28}", *(f"{row[column]:10.1f}" for column in columns), flush=True)
    stem.with_suffix(".json").write_text(json.dumps({"table": rows, "histories": histories}))
    curves(stem.with_name(f"{stem.name}_curves.png"), histories)


def curves(path: Path, histories: dict[str, History]) -> None:
    """Draw the loss and the metric of both backbones over steps."""
    kinds = list(next(iter(histories.values())))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.2), layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        for name, history in histories.items():
            steps, values = zip(*history[kind], strict=True)
            axis.plot(
                steps,
                values,
                color=COLOURS[name],
                alpha=0.3 if kind == "loss" else 1,
                label=None if kind == "loss" else f"{name} backbone",
            )
            if kind == "loss":
                width = max(1, len(values) // 20)
                smooth = torch.tensor(values).unfold(0, width, 1).mean(1)
                axis.plot(steps[width - 1 :], smooth, color=COLOURS[name], label=f"{name} backbone")
        axis.set(xlabel="step", title={"loss": "training loss"}.get(kind, f"{kind}, held out (%)"))
        axis.set_ylim(bottom=0 if kind != "loss" else None)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
