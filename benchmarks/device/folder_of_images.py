"""``diffusion-backbones extract`` on a folder of JPEGs, beside the network's own rate."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.extraction import draw
from diffusion_backbones import DiffusionBackbone
from diffusion_backbones.evaluation import benchmark
from diffusion_backbones.evaluation.benchmark import Setting
from diffusion_backbones.extraction import extract, images
from diffusion_backbones.extraction.stages import Reader

DRAWN = 16
"""Photographs that are drawn; the others are the same again under other names, and decoded anew."""


def extraction(backbone: DiffusionBackbone, setting: Setting, count: int) -> tuple[float, float, float]:
    """Seconds an image: of the extraction, of reading alone in one thread, of the network alone.

    Args:
        backbone: The network.
        setting: Of its call: batch, side and device.
        count: Photographs of 1.9 megapixels.
    """
    call = partial(backbone, setting.images())
    alone = statistics.median(benchmark.alternate({"network": call}, 5, setting.device)["network"]) / setting.batch
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        drawn = draw(photos, "photographs", min(DRAWN, count))
        for i in range(len(drawn), count):
            (photos / f"{i:03}.jpg").hardlink_to(drawn[i % len(drawn)].path)
        files, read = images.find([photos]), Reader(backbone, setting.side)
        reading = statistics.median(benchmark.once(partial(read, file)) for file in files[:DRAWN])
        began = time.perf_counter()
        summary = extract(backbone, files, Path(scratch) / "maps", size=setting.side, batch_size=setting.batch)
        seconds = (time.perf_counter() - began) / count
        if summary.done != count:
            raise RuntimeError(f"{summary.done} of {count} images were extracted: {summary.failed}")
    return seconds, reading, alone
