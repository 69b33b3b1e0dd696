"""The three stages of an extraction: a file is read, a batch is computed, its features are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.out_of_memory import is_oom
from diffusion_backbones.extraction import images
from diffusion_backbones.extraction.folder import Folder
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.settings import image_digest
from diffusion_backbones.ops.describe import gigabytes
from diffusion_backbones.ops.free_memory import free_memory

PREPARING = 28
"""Bytes that preprocessing takes for a pixel on top of the decoded image, measured."""
COMPUTING = 5
"""How many of the image encoder's widest maps a call takes on the CPU, measured."""


@dataclass(frozen=True)
class Input:
    """An image, ready for the network, or the reason why it cannot be read.

    Args:
        file: The image's file.
        x: (3, H, W); None if it cannot be read, or once it has been computed.
        size: (H, W) of ``x``, which outlives it.
        original: (H, W) in the file.
        digest: Names the content of the file.
        advice: A warning for the user, or empty.
        error: Why it cannot be read, or empty.
    """

    file: ImageFile
    x: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    original: tuple[int, int] = (0, 0)
    digest: str = ""
    advice: str = ""
    error: str = ""


@dataclass(frozen=True)
class Output:
    """A batch and its pyramid.

    Attributes:
        batch: Images of one size, or one that could not be read.
        pyramid: Maps (B, C_i, h_i, w_i) on the CPU, in the dtype of the files; empty if there was no image or not
            enough memory.
        arrived: Blocks until the values have been copied from the device.
    """

    batch: Sequence[Input]
    pyramid: Sequence[Tensor] = ()
    arrived: Callable[[], None] = field(default=lambda: None)


class Reader:
    """Reads a file into the input of a backbone. Several threads may call it at once.

    Args:
        backbone: Its input format is used; for a GPU the image is put into pinned memory.
        size, max_pixels: As in :func:`~diffusion_backbones.extraction.extract`.
        obstacle: Says why the features of a file cannot be kept, or nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int | None,
        max_pixels: int | None = None,
        obstacle: Callable[[ImageFile], str] = lambda _: "",
    ):
        self.declaration, self.own_size, self.max_pixels = backbone.declaration, size is None, max_pixels
        self.preprocess = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)
        self.pinned, self.obstacle = _asynchronous(backbone.device), obstacle
        self.bytes_per_pixel = images.DECODING + (bytes_per_pixel(backbone) if self.own_size else 0)

    def __call__(self, file: ImageFile) -> Input:
        """The input, or one with an ``error`` if the file cannot be read, whatever the reason."""
        if obstacle := self.obstacle(file):
            return Input(file, error=obstacle)
        try:
            return self._read(file)
        except Exception as error:  # one image must not cost the others, and libraries fail in ways of their own
            reason = f"{type(error).__name__} {error}".strip()
            told = str(error) if isinstance(error, ValueError) else f"{file.path} cannot be prepared: {reason}"
            return Input(file, error=told)

    def _read(self, file: ImageFile) -> Input:
        digest = image_digest(file.path)  # before it is read: what changes meanwhile is made again next time
        image = images.load(file.path, self.max_pixels, self.bytes_per_pixel)
        x = self.preprocess(image)
        return Input(
            file,
            x.pin_memory() if self.pinned else x,
            size=(x.shape[-2], x.shape[-1]),
            original=(image.height, image.width),
            digest=digest,
            advice=images.too_large(file.path, image, self.declaration) if self.own_size else "",
        )


def bytes_per_pixel(backbone: Backbone) -> float:
    """Bytes of the machine's memory that a pixel of an image takes from the decoded image to the features."""
    if backbone.device.type != "cpu":
        return PREPARING
    return PREPARING + COMPUTING * backbone.widest_map * backbone.encoder_dtype.itemsize


def check_fits(backbone: Backbone, size: int | tuple[int, int], batch_size: int) -> None:
    """Check that a batch of one size fits the memory.

    Args:
        backbone: The network.
        size: Side of the squares, or (H, W), in pixels.
        batch_size: Number of images.

    Raises:
        ValueError: It does not.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    needed, free = int(height * width * batch_size * bytes_per_pixel(backbone)), free_memory()
    if needed > free:
        raise ValueError(
            f"a batch of {batch_size} with {width} x {height} pixels needs {gigabytes(needed)} of memory here, and "
            f"{gigabytes(free)} are free; use a smaller --size or --batch-size"
        )


def advised(inputs: Iterable[Input]) -> Iterator[Input]:
    """Pass the inputs through and print the first warning once."""
    warned = False
    for item in inputs:
        if item.advice and not warned:
            warned = True
            tqdm.write(item.advice, file=sys.stderr)
        yield item


def batches(inputs: Iterable[Input], batch_size: int) -> Iterator[list[Input]]:
    """Group neighbours of equal size, at most ``batch_size`` of them; an unreadable image is a group of its own."""
    batch: list[Input] = []
    for item in inputs:
        if batch and (len(batch) == batch_size or item.error or batch[0].error or item.size != batch[0].size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class Computer:
    """Computes the pyramid of a batch. On a GPU it returns before the result is there, so that the next batch follows
    without a gap.

    Args:
        backbone: The network; it runs on its own device.
        dtype: Dtype of the maps.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype):
        self.backbone, self.dtype, self.device = backbone, dtype, backbone.device
        self.bytes_per_pixel = bytes_per_pixel(backbone)

    @property
    def precision(self) -> str:
        """Dtype and device that the network computes in: ``float32 on cpu``."""
        return f"{self.backbone.dtype} on {self.device.type}".removeprefix("torch.")

    def __call__(self, batch: Sequence[Input]) -> Output:
        """The batch and its pyramid, or no pyramid if it does not fit the memory."""
        later = _asynchronous(self.device)
        done = [replace(item, x=None) for item in batch]
        pixels = sum(item.size[0] * item.size[1] for item in batch)
        if pixels * (self.bytes_per_pixel - PREPARING) > free_memory():  # the system would end the process
            return Output(done)
        try:
            with torch.inference_mode():
                x = [item.x.to(self.device, non_blocking=later) for item in batch if item.x is not None]
                pyramid = (
                    [level.to(self.dtype).to("cpu", non_blocking=later) for level in self.backbone(torch.stack(x))]
                    if x
                    else []
                )
        except (RuntimeError, MemoryError) as error:
            if is_oom(error):
                return Output(done)
            raise
        return (
            Output(done, pyramid, torch.cuda.current_stream(self.device).record_event().synchronize)
            if later
            else Output(done, pyramid)
        )


class Writer:
    """Writes a batch image by image, and reports each.

    Args:
        backbone: The network that made the maps.
        folder: The folder they are written to.
        report: Called with every image and None once its features are on disk, or the reason why they are not.
    """

    def __init__(self, backbone: Backbone, folder: Folder, report: Callable[[ImageFile, str | None], None]):
        self.declaration, self.device = backbone.declaration, backbone.device
        self.strides = backbone.feature_info.reduction()
        self.folder, self.report = folder, report

    def __call__(self, output: Output) -> None:
        """Write the images of a batch once their values have arrived."""
        output.arrived()
        for i, item in enumerate(output.batch):
            self.report(item.file, self._keep(item, [level[i] for level in output.pyramid], len(output.batch)))

    def _keep(self, item: Input, pyramid: Sequence[Tensor], together: int) -> str | None:
        """Write one image's maps, (C, h, w) each, or return why not. ``together`` is the batch size of that pass."""
        if item.error:
            return item.error
        if not pyramid:
            batch = f"a batch of {together} with {item.size[1]} x {item.size[0]} pixels"
            return (
                f"{item.file.path} does not fit the memory of {self.device}: {batch}; use a smaller --size or "
                "--batch-size"
            )
        settings = self.folder.settings
        maps = dict(zip(settings.levels, pyramid, strict=True))
        unfit = [name for name, level in maps.items() if not torch.isfinite(level).all()]
        if unfit:
            return (
                f"{item.file.path}: {', '.join(unfit)} has values that {settings.dtype} cannot hold; use --dtype "
                "bfloat16 or float32"
            )
        self.folder.write(item.file, maps, self._metadata(item))
        return None

    def _metadata(self, item: Input) -> dict[str, str]:
        settings = self.folder.settings
        return {
            "backbone": self.declaration.name,
            "recipe_digest": settings.recipe_digest,
            "strides": json.dumps(dict(zip(settings.levels, self.strides, strict=True))),
            "original_size": json.dumps(item.original),
            "input_size": json.dumps(item.size),
            "weights": json.dumps(self.folder.about["weights"]),
            "image": item.digest,
        }


def _asynchronous(device: torch.device) -> bool:
    """Whether copies to and from a device run while the CPU does something else."""
    return device.type == "cuda"
