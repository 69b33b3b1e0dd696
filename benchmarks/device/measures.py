"""What a job measures: functions of a job and a place, which yield a row for each batch size, or a few.

A row is one of ``diffusion_backbones.evaluation.benchmark_table``, as far as it is filled in, and a ``note``.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.device import kernels
from benchmarks.device.folder_of_images import extraction
from benchmarks.device.jobs import Job
from benchmarks.device.networks import build, setting, ways
from benchmarks.device.place import Place
from benchmarks.device.worker import said
from diffusion_backbones import DiffusionBackbone
from diffusion_backbones.evaluation import benchmark, benchmark_table, memory_benchmark
from diffusion_backbones.evaluation.benchmark import Timing
from diffusion_backbones.evaluation.memory_benchmark import Footprint
from diffusion_backbones.ops.truncation import count_bytes
from diffusion_backbones.reports import costs

Row = Mapping[str, Any]
SECONDS, MOST_ROUNDS = 1.5, 20
"""How long the calls of a row are repeated, if that is at least three times, and how often at most."""


def run(job: Job, place: Place) -> Iterator[Row]:
    """The rows of a job. What it held of the device's memory is given back, also when it fails."""
    try:
        yield from MEASURES[job.measure](job, place)
    finally:
        release()


def well(device: str) -> bool:
    """Whether a device still computes: after a kernel's fault every later call of its process fails."""
    try:
        torch.ones(1, device=device).add_(1).tolist()
    except RuntimeError:
        return False
    return True


def release() -> None:
    """Give back the memory of what is no longer used, networks with hooks in circles among it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def product(_: Job, place: Place) -> Iterator[Row]:
    """What the device reaches in a plain product of matrices, which is the measure of all else."""
    for dtype in ("bfloat16", "float16"):
        reached = _matmul(place.device, dtype, place.rehearse)
        hardware = benchmark_table.hardware(place.device)
        yield {"way": "product of matrices", "dtype": dtype, "matmul_gflops": reached, "hardware": hardware}


@functools.cache
def _matmul(device: str, dtype: str, rehearse: bool) -> float:
    return benchmark.matmul_gflops(device, dtype, 256 if rehearse else 4096)


def speed(job: Job, place: Place) -> Iterator[Row]:
    """Seconds of a call, and the most memory in use until then."""
    backbone = build(job, place)
    yield from _each_batch(job, place, lambda batch: _speed(job, batch, backbone, place))


def _each_batch(job: Job, place: Place, rows: Callable[[int], Iterator[Row]]) -> Iterator[Row]:
    """The rows of every batch size; what cannot be measured is a row that says why, and the next size is tried."""
    for batch in job.batches:
        try:
            yield from rows(batch)
        except Exception as error:
            if not well(place.device):
                raise
            yield {"batch": batch, "note": said(error)}
        release()


def _speed(job: Job, batch: int, backbone: DiffusionBackbone, place: Place) -> Iterator[Row]:
    asked, cuda = setting(job, batch, place), torch.device(place.device).type == "cuda"
    x = asked.images()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    calls = ways(job, backbone, x)
    for call in calls.values():
        benchmark.once(call, place.device)
    first = time.perf_counter() - began
    took = sum(benchmark.once(call, place.device) for call in calls.values())
    rounds = 1 if place.rehearse else max(3, min(MOST_ROUNDS, int(SECONDS / took)))
    seconds = benchmark.alternate(calls, rounds, place.device)
    footprint = Footprint(0, count_bytes(backbone), torch.cuda.max_memory_allocated() if cuda else None)
    operations = _gflops(backbone)
    timings = [
        Timing(way, tuple(times), operations.get(way), footprint=footprint if i == 0 else None)
        for i, (way, times) in enumerate(seconds.items())
    ]
    hooks = [] if benchmark.HOOKS in seconds else [Timing(benchmark.HOOKS, timings[0].seconds)]
    found = benchmark_table.rows([*timings, *hooks], asked, _matmul(place.device, job.dtype, place.rehearse))
    note = f"ready after {first:.1f} s"
    if backbone.architecture.encoder and backbone.encoder_dtype != backbone.dtype:
        note += f", image encoder in {str(backbone.encoder_dtype).removeprefix('torch.')}"
    for row in found[: len(timings)]:
        # what the backbone is compared with is another job's, and random weights are not loaded
        yield {**row, "rounds": rounds, "speed": None, "load_seconds": None, "note": note}


def _gflops(backbone: DiffusionBackbone) -> dict[str, float]:
    """1e9 operations for one image, by the registered backbone's own costs: in a rehearsal they mean nothing."""
    declaration = backbone.declaration
    cost = costs.published()[declaration.name]
    draws = declaration.recipe.ensemble
    denoiser = backbone.plan.passes * cost["denoiser_gflops"]
    return {
        benchmark.BACKBONE: denoiser + cost["encoder_gflops"],
        benchmark.LATENTS: denoiser,
        benchmark.ENCODES: denoiser + draws * cost["encoder_gflops"],
    }


def profile(job: Job, place: Place) -> Iterator[Row]:
    """The ten dearest kernels of a call, appended to ``profile.txt``; the row says how busy they keep the device."""
    backbone = build(job, place)

    def rows(batch: int) -> Iterator[Row]:
        asked = setting(job, batch, place)
        [call, *_] = ways(job, backbone, asked.images()).values()
        text, busy = kernels.dearest(call, place.device)
        with (place.out / "profile.txt").open("a") as file:
            file.write(f"{job.name}, batch {batch}\n{text}\n\n")
        yield {"batch": batch, "way": "profile", "note": f"kernels run {busy:.0%} of the time: profile.txt"}

    yield from _each_batch(job, place, rows)


def extract(job: Job, place: Place) -> Iterator[Row]:
    """A folder of JPEGs to features on disk, beside the network's own rate."""
    backbone = build(job, place)

    def rows(batch: int) -> Iterator[Row]:
        asked = setting(job, batch, place)
        count = 4 if place.rehearse else 256
        seconds, read, alone = extraction(backbone, asked, count)
        note = f"{count} JPEGs, {1 / seconds:.1f} a second: {alone / seconds:.2f} of the network's own rate, "
        note += f"{1 / alone:.1f}; a thread reads {1 / read:.1f}"
        yield {"batch": batch, "way": "extract, JPEGs to features", "seconds": batch * seconds, "note": note}

    yield from _each_batch(job, place, rows)


def load(job: Job, place: Place) -> Iterator[Row]:
    """Seconds to load, and memory, of the saved backbone and of the usual pipeline, each in a process of its own."""
    backbone, asked = build(job, place), setting(job, 1, place)
    x = asked.images().cpu()
    alone = (lambda work, *given: work(*given)) if place.rehearse else memory_benchmark.alone
    declaration = backbone.declaration
    with memory_benchmark.written(backbone, job.dtype, lambda _: None) as (saved, pipeline):
        del backbone
        release()
        for way, work, given in (
            (benchmark.BACKBONE, memory_benchmark.backbone, (saved,)),
            (benchmark.HOOKS, memory_benchmark.pipeline, (pipeline, declaration)),
        ):
            found = alone(work, *given, x, job.dtype, place.device)
            yield {
                "way": f"{way}, loaded",
                "load_seconds": found.seconds,
                "weights_bytes": found.weights,
                "peak_bytes": found.peak,
            }


MEASURES: dict[str, Callable[[Job, Place], Iterator[Row]]] = {
    function.__name__: function for function in (product, speed, profile, extract, load)
}
