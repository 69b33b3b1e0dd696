"""The whole extraction: finished images are skipped, the rest is read, computed and written at once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.extraction.folder import ABOUT, ORDER, Folder
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.prefetch import prefetch_map, threads
from diffusion_backbones.extraction.settings import Settings
from diffusion_backbones.extraction.stages import Computer, Reader, Writer, advised, batches, check_fits
from diffusion_backbones.ops.tensor_checks import FLOATING
from diffusion_backbones.spec.validation import as_integer, check_count, check_flag

MOST_WORKERS = 8
"""Threads that read by default for a GPU, if the machine has as many cores."""


@dataclass
class Summary:
    """The result of an extraction.

    Args:
        done: Number of images that were extracted now.
        skipped: Number of images that an earlier run had finished.
        failed: Name -> reason, of the others.
    """

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def default_workers(device: torch.device) -> int:
    """Default number of threads that read: none on the CPU, whose cores the network needs, and several beside a GPU."""
    return 0 if device.type == "cpu" else min(MOST_WORKERS, os.cpu_count() or 1)


def extract(
    backbone: Backbone,
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
    max_pixels: int | None = None,
    order: str | None = None,
) -> Summary:
    """Write the pyramid of every image, except those that an earlier call with the same settings has finished, of the
    same image by its content. Several processes may do so in one folder.

    With ``workers``, the next batch is read and the last is written while one is computed. Memory holds at most ``2 *
    batch_size + workers + 1`` images and the features of two batches, however many images there are.

    Args:
        backbone: The network, on the device and in the dtype that it shall compute in.
        files: Images, from :func:`diffusion_backbones.extraction.images.find`.
        out: Output folder, made if it does not exist.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps every image's own size.
        dtype: Dtype of the written maps.
        batch_size: Images per pass. Only neighbours of equal size share one.
        workers: Threads that read, beside one that writes; 0 does one thing after another, without threads. The
            default is :func:`default_workers`.
        names: Names of the maps; the default is ``level0``, ``level1`` ...
        weights: Where the weights came from, for the record; the default is ``backbone.provenance``. They are told
            apart by their content.
        overwrite: Make every image again, and replace the settings of a folder.
        max_pixels: The most pixels of an image file; the default is the limit of Pillow, 179 million.
        order: Noted in the manifest, so that the same order finds out without the network whether all is finished; see
            :class:`diffusion_backbones.extraction.rerun.Order`.

    Returns:
        Counts, and the images that could not be read or kept or do not fit memory or ``dtype``, with the reason.

    Raises:
        TypeError: The backbone, files or flags are of another kind.
        ValueError: ``out`` holds features with other settings, of other images, or files that are not ours; or a batch
            does not fit the memory; or a setting has a value that cannot be.
        OSError: A file cannot be written. Finished images stay, and no half-written file does.
    """
    if not os.fspath(out):
        raise ValueError("out is empty; name a folder for the features, or '.' for this one")
    _check_kinds(backbone, files, names, dtype, overwrite)
    check_count("batch_size", batch_size)
    for what, count in (("size", size), ("max_pixels", max_pixels)):  # however large: memory is asked, and is the limit
        if count is not None and (as_integer(count) or 0) < 1:
            raise ValueError(f"{what} must be an integer from 1 up, got {count!r}")
    if workers is not None and (as_integer(workers) is None or workers < 0):
        raise ValueError(f"workers must be an integer from 0 up, got {workers!r}")
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of texts, got {weights!r:.80}")
    if backbone.device.type == "meta":
        raise ValueError("the backbone is on 'meta' and has no values; build it on another device")
    if size is not None:
        check_fits(backbone, size, batch_size)
    recipe, source = backbone.declaration.described(), dict(weights or backbone.provenance)
    about = dict(zip((*ABOUT, ORDER), (recipe, source, backbone.device.type, order), strict=True))
    folder = Folder(Path(out), Settings.of(backbone, names, size, dtype), about, overwrite)
    waiting = folder.waiting(files)
    folder.begin(files, waiting)
    summary = Summary(skipped=len(files) - len(waiting))
    threads_that_read = default_workers(backbone.device) if workers is None else workers
    try:
        reader = Reader(backbone, size, max_pixels, folder.obstacle)
        _run(reader, Computer(backbone, dtype), folder, waiting, batch_size, threads_that_read, summary)
    finally:
        folder.close()  # also when interrupted, so that the manifest is current
    return summary


def _check_kinds(backbone: Any, files: Any, names: Any, dtype: Any, overwrite: Any) -> None:
    """Check what an extraction is given, but for numbers; errors as for :func:`extract`."""
    if not isinstance(backbone, Backbone):
        raise TypeError(f"extract takes a backbone from create_model, got {backbone!r:.80}")
    if odd := [file for file in files if not isinstance(file, ImageFile)]:
        raise TypeError(f"files must be those that images.find([...]) gives, got {odd[0]!r:.80}")
    if outside := [file.name for file in files if not _is_inside(file.name)]:
        raise ValueError(f"features are kept under the name of an image, below out, and {outside[0]!r} leads elsewhere")
    if twice := [name for name, n in Counter(file.name for file in files).items() if n > 1]:
        raise ValueError(f"two images would both be kept as {twice[0]!r}; give each a name of its own")
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be a torch.dtype of floating point, such as torch.float16, got {dtype!r}")
    check_flag("overwrite", overwrite)
    given, maps = [] if names is None else list(names), len(backbone.out_maps)
    texts = not isinstance(names, str) and all(isinstance(name, str) and name for name in given)
    if names is not None and not (texts and len(given) == len(set(given)) == maps):
        raise ValueError(f"names must be {maps} different texts, one for each map, got {names!r:.80}")


def _is_inside(name: Any) -> bool:
    """Whether a relative name stays below the folder that it is in."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("..")
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _run(
    reader: Reader,
    computer: Computer,
    folder: Folder,
    waiting: Sequence[ImageFile],
    batch_size: int,
    workers: int,
    summary: Summary,
) -> None:
    """Read, compute and write the images, and count them in ``summary``."""

    def report(file: ImageFile, error: str | None) -> None:
        if error is None:
            summary.done += 1
        else:
            summary.failed[file.name] = error
            tqdm.write(f"failed: {error}", file=sys.stderr)
        folder.note(file, error)
        bar.update()

    with (
        tqdm(total=summary.skipped + len(waiting), initial=summary.skipped, unit="image", disable=None) as bar,
        threads(workers, finish=False) as readers,
        threads(min(workers, 1), finish=True) as writers,  # what was computed is not lost by what comes after
    ):
        inputs = advised(prefetch_map(readers, reader, waiting, depth=batch_size + workers))
        outputs = map(computer, batches(inputs, batch_size))
        for _ in prefetch_map(writers, Writer(computer.backbone, folder, report), outputs, depth=1):
            pass
