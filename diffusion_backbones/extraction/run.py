"""The whole extraction: what is finished is skipped, and the rest is read, computed and written at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.extraction.folder import Folder, Settings
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.prefetch import ahead, threads
from diffusion_backbones.extraction.stages import Computer, Reader, Writer, advised, batches, device_of

MOST_WORKERS = 8
"""Threads that read by default for a GPU, where the machine has as many cores."""


@dataclass
class Summary:
    """What became of the images: how many were made now, how many had been before, and why the others failed."""

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def default_workers(device: torch.device) -> int:
    """Threads that read where nobody says how many: none on the CPU, whose cores the network needs itself, and several
    beside a GPU.
    """
    return 0 if device.type == "cpu" else min(MOST_WORKERS, os.cpu_count() or 1)


def extract(
    backbone: DiffusionBackbone,
    files: Sequence[ImageFile],
    out: str | Path,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 1,
    workers: int | None = None,
    names: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write the pyramid of every image, and skip those that an earlier call with the same settings has finished.

    With ``workers``, the next batch is read and the last is written while one is computed. In memory are at most ``2 *
    batch_size + workers + 1`` images and the features of two batches, however many images there are.

    Args:
        backbone: On its device, in the dtype that it shall compute in.
        files: What :func:`diffusion_backbones.extraction.images.find` gives.
        out: Folder, made if it is not there.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps every image's own size.
        dtype: Of what is written.
        batch_size: Images per pass. Only neighbours of equal size share one.
        workers: Threads that read, beside one that writes. 0 does one thing after another, without threads. By default
            :func:`default_workers`.
        names: Of the maps, ``level0``, ``level1`` ... by default.
        weights: Where the weights came from, if ``backbone.provenance`` does not say it.
        overwrite: Make every image again, and replace a folder's settings.

    Returns:
        Counts, and the images that could not be read or do not fit memory or ``dtype``, with the reason.

    Raises:
        ValueError: ``out`` holds features that were made by other settings.
        OSError: Something cannot be written. What was finished before stays, and nothing is left half-written.
    """
    declaration, recipe = backbone.declaration, backbone.declaration.recipe
    workers = default_workers(device_of(backbone)) if workers is None else workers
    names = tuple(names or (f"level{i}" for i in range(len(backbone.feature_info.channels()))))
    settings = Settings(
        backbone=declaration.architecture,
        tag=declaration.tag,
        weights=dict(weights or backbone.provenance),
        recipe_digest=recipe.digest,
        prompt=recipe.prompt,
        timestep=recipe.timestep,
        levels=names,
        size=size,
        dtype=str(dtype).removeprefix("torch."),
    )
    compute = Computer(backbone, dtype)
    folder = Folder(Path(out), settings, {"recipe": recipe.to_dict(), "computed": compute.precision}, overwrite)
    waiting = [file for file in files if overwrite or not folder.finished(file)]
    summary = Summary(skipped=len(files) - len(waiting))
    folder.begin(files, waiting)

    def tell(file: ImageFile, error: str | None) -> None:
        if error is None:
            summary.done += 1
        else:
            summary.failed[file.name] = error
            tqdm.write(f"failed: {error}", file=sys.stderr)
        folder.note(file, error)
        bar.update()

    try:
        with (
            tqdm(total=len(files), initial=summary.skipped, unit="image", disable=None) as bar,
            threads(workers, finish=False) as readers,
            threads(min(workers, 1), finish=True) as writer,  # what was computed is not lost by what comes after
        ):
            inputs = advised(ahead(readers, Reader(backbone, size), waiting, depth=batch_size + workers))
            outputs = map(compute, batches(inputs, batch_size))
            for _ in ahead(writer, Writer(backbone, folder, tell), outputs, depth=1):
                pass
    finally:
        folder.write_manifest()  # also when interrupted, so that it is current
    return summary
