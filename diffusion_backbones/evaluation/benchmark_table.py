"""The results of a benchmark as rows of a CSV."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from diffusion_backbones import __version__
from diffusion_backbones.evaluation import csv_table
from diffusion_backbones.evaluation.benchmark import HOOKS, Setting, Timing

COLUMNS = (
    *("way", "seconds", "least", "most", "speed", "gflops", "share_of_matmul"),
    *("encoder_seconds", "denoiser_seconds", "parts_seconds", "load_seconds", "weights_bytes", "peak_bytes"),
    *("date", "hardware", "backbone", "options", "dtype", "batch", "size", "rounds", "matmul_gflops"),
    *("torch", "package", "command"),
)
"""Columns of :func:`rows`."""


def rows(timings: Sequence[Timing], setting: Setting, product: float) -> list[dict[str, Any]]:
    """A row for each way, with all that its numbers depend on.

    Args:
        timings: From :func:`~diffusion_backbones.evaluation.benchmark.bench`.
        setting: What was timed.
        product: From :func:`~diffusion_backbones.evaluation.benchmark.matmul_gflops`.
    """
    [hooks] = [timing for timing in timings if timing.way == HOOKS]
    shared = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(setting.device),
        "backbone": setting.name,
        "options": " ".join(f"{key}={value}" for key, value in setting.options.items()),
        "dtype": setting.dtype,
        "batch": setting.batch,
        "size": setting.side,
        "rounds": setting.rounds,
        "matmul_gflops": product,
        "torch": torch.__version__,
        "package": __version__,
        "command": _command(),
    }
    return [{**_row(timing, hooks, setting.batch, product), **shared} for timing in timings]


def _row(timing: Timing, hooks: Timing, batch: int, product: float) -> dict[str, Any]:
    footprint = timing.footprint
    return {
        "way": timing.way,
        "seconds": timing.median,
        "least": min(timing.seconds),
        "most": max(timing.seconds),
        "speed": timing.speed(hooks),
        "gflops": timing.gflops,
        "share_of_matmul": timing.gflops and batch * timing.gflops / timing.median / product,
        "encoder_seconds": timing.parts.get("encoder"),
        "denoiser_seconds": timing.parts.get("denoiser"),
        "parts_seconds": timing.parts.get("call"),
        "load_seconds": footprint and footprint.seconds,
        "weights_bytes": footprint and footprint.weights,
        "peak_bytes": footprint and footprint.peak,
    }


def write(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Append rows to a CSV; numbers have four digits.

    Raises:
        ValueError: It is a file with other columns.
        OSError: It cannot be written.
    """
    new = [{key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in found]
    csv_table.update(path, list(found[0]), lambda before: [*before, *new])


def hardware(device: str) -> str:
    """The name of a device: its GPU, or its CPU and the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _command() -> str:
    """The command as it was typed, without ``--csv`` and its file."""
    words = ["", Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(word for before, word in pairwise(words) if before != "--csv" and word.partition("=")[0] != "--csv")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
