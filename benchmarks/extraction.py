"""What is measured of ``diffusion-backbones extract``: see ``run.py``, which calls the functions here."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
SIDES = {"photographs": (1600, 1200), "thumbnails": (64, 64)}
SD15_AT_512 = ((320, 64), (640, 32), (2560, 16))
"""Channels and side of the maps of ``sd15_gdf``: 10.5 MB an image in float32, as it would write them."""


def draw(folder: Path, kind: str, count: int) -> Sequence[Any]:
    """JPEGs of a kind, all different: parts of a photograph, enlarged, with noise as fine as a sensor's."""
    from diffusion_backbones.extraction import images

    source, random = Image.open(PHOTO).convert("RGB"), np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        part = np.asarray(
            source.resize(SIDES[kind], box=(i, i, i + 320, i + 240), resample=Image.Resampling.BICUBIC),
            dtype=np.float32,
        )
        noisy = (part + random.normal(0, 4, part.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:03}.jpg", quality=90)
    return images.find([folder])


def times(rounds: int, ways: dict[Any, Callable[[Path], Any]]) -> dict[Any, list[float]]:
    """Seconds of each way, in turn, after one warm-up. Each is given a folder that is not there yet."""
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        fresh = (Path(scratch) / str(i) for i in itertools.count())
        for i in range(rounds + 1):
            for way, run in ways.items():
                out = next(fresh)
                began = time.perf_counter()
                run(out)
                if i:
                    seconds[way].append(time.perf_counter() - began)
    return seconds


def median_ratio(seconds: dict[Any, list[float]], a: Any, b: Any) -> float:
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def extract(rounds: int) -> dict[str, float]:
    """Reading, computing and writing at once against one after another, and images a second by batch size.

    Photographs of 1.9 megapixels, cut down to 64 x 64, on ``tinysd_gdf``: first on the CPU, where all three want the
    same cores; then on a stand-in for a device of its own, which waits, without using the CPU, as long as reading and
    writing take together, and gives maps as large as those of ``sd15_gdf`` at 512 x 512. At best half of the time is
    left, and the device is never without work.
    """
    import torch

    import diffusion_backbones as db
    from diffusion_backbones.extraction import extract
    from diffusion_backbones.extraction.stages import Reader

    backbone = db.create_model("tinysd_gdf", pretrained=True)
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = draw(Path(scratch) / "photos", "photographs", 32)
        cpu = times(
            rounds,
            {w: lambda out, w=w: extract(backbone, photos, out, size=64, batch_size=4, workers=w) for w in (0, 1)},
        )
        results["extract: CPU, at once / one after another"] = median_ratio(cpu, 1, 0)

        pyramid = [torch.randn(4, channels, side, side) for channels, side in SD15_AT_512]
        device = db.create_model("tinysd_gdf", pretrained=True)
        pause = 0.0

        def forward(x: Any) -> list[Any]:
            time.sleep(pause * len(x))
            return [level[: len(x)] for level in pyramid]

        device.forward = forward

        def run(workers: int) -> Callable[[Path], Any]:
            return lambda out: extract(device, photos, out, size=64, batch_size=4, dtype=torch.float32, workers=workers)

        read = Reader(backbone, 64)
        alone = times(rounds, {"read": lambda _: [read(file) for file in photos], "read and write": run(0)})
        reading, both = (statistics.median(alone[way]) for way in ("read", "read and write"))
        pause = both / len(photos)
        waited = times(rounds, {w: run(w) for w in (0, 1)})
        results["extract: stand-in, seconds of reading, alone"] = reading
        results["extract: stand-in, seconds of writing, alone"] = both - reading
        results["extract: stand-in, seconds of the device, alone"] = pause * len(photos)
        results["extract: stand-in, seconds one after another"] = statistics.median(waited[0])
        results["extract: stand-in, seconds at once"] = statistics.median(waited[1])
        results["extract: stand-in, at once / one after another"] = median_ratio(waited, 1, 0)
        results["extract: stand-in, at once / the device alone"] = statistics.median(waited[1]) / (pause * len(photos))

        small = draw(Path(scratch) / "small", "thumbnails", 32)
        batched = times(
            max(1, rounds // 2),
            {b: lambda out, b=b: extract(backbone, small, out, batch_size=b) for b in (1, 2, 4, 8, 16)},
        )
        for b in batched:
            results[f"extract: CPU, 64 x 64, images a second, batch {b}"] = len(small) / statistics.median(batched[b])
        results["extract: CPU, 64 x 64, seconds, batch 16 / batch 1"] = median_ratio(batched, 16, 1)
    return results


def extract_memory(first: int = 500, count: int = 10_000, side: int = 32) -> dict[str, float]:
    """How much more memory a process has used at most when 10,000 small images are done than it had after 500.

    An image is 12 kB for the network, and its features are 5.5 kB in float32: were either kept, it would show.
    """
    import torch

    import diffusion_backbones as db
    from diffusion_backbones.extraction import extract, images

    backbone, random = db.create_model("tinysd_gdf", pretrained=True), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "images", Path(scratch) / "out"
        folder.mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:05}.png")
        files = images.find([folder])
        peaks = []
        for some in (files[:first], files):
            extract(backbone, some, out, dtype=torch.float32, batch_size=16, workers=1)
            peaks.append(
                next(
                    int(line.split()[1]) * 1024
                    for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("VmHWM")
                )
            )
    return {
        f"extract_memory: peak after {first:,} images, MB": peaks[0] / 1e6,
        f"extract_memory: peak after {count:,} images, MB": peaks[1] / 1e6,
        "extract_memory: bytes more for each image more": (peaks[1] - peaks[0]) / (count - first),
    }
