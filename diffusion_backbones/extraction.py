"""Folders of images -> one ``.safetensors`` of features per image.

::

    features/
      manifest.json                       settings, versions, and what became of every image
      street/01.jpg.safetensors           level0 (C, h, w), level1 ...; metadata: strides, sizes, backbone, weights

A file is there whole or not at all, and says by which settings it was made. So a run can be stopped in any way and
started again: what is finished is skipped, and nothing is mixed. Features are written image by image and never gathered.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffusion_backbones import images, memory, tensors
from diffusion_backbones.backbone import DiffusionBackbone
from diffusion_backbones.images import ImageFile
from diffusion_backbones.version import __version__

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "diffusers", "transformers", "timm", "safetensors", "pillow")
REFRESH = 30.0
"""Seconds after which a running extraction writes its manifest again."""


@dataclass(frozen=True)
class Settings:
    """All that the features of an image depend on; what shares a folder shares these.

    Args:
        backbone: Name, without tag.
        tag: Which weights of that name, or empty.
        weights: Where they came from, see ``DiffusionBackbone.provenance``.
        recipe_digest: Of the recipe, which prompt, timestep and noise are part of.
        prompt, timestep: Once more by themselves, so that a difference can be named.
        levels: Names of the tensors, fine to coarse.
        size: Side of the squares that images are resized and cropped to, or None for their own size.
        dtype: Of the tensors.
    """

    backbone: str
    tag: str
    weights: Mapping[str, str]
    recipe_digest: str
    prompt: str
    timestep: float
    levels: tuple[str, ...]
    size: int | None
    dtype: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that every file of these settings carries."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "levels": list(self.levels)}


@dataclass
class Summary:
    """What became of the images: how many were made now, how many had been before, and why the others failed."""

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def extract(
    backbone: DiffusionBackbone,
    files: Sequence[ImageFile],
    out: str | Path,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 1,
    names: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write the pyramid of every image, and skip those that an earlier call with the same settings has finished.

    Args:
        backbone: On its device, in the dtype that it shall compute in.
        files: What :func:`diffusion_backbones.images.find` gives.
        out: Folder, made if it is not there.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps every image's own size.
        dtype: Of what is written.
        batch_size: Images per pass. Only neighbours of equal size share one.
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
    writer = _Writer(backbone, settings, dtype)
    folder = _Folder(Path(out), settings, {"recipe": recipe.to_dict(), "computed": writer.precision}, overwrite)
    waiting = [file for file in files if overwrite or not folder.finished(file)]
    summary = Summary(skipped=len(files) - len(waiting))
    folder.begin(files, waiting)
    try:
        with tqdm(total=len(files), initial=summary.skipped, unit="image", disable=None) as bar:
            for file, result in writer.run(_batches(_inputs(backbone, waiting, size), batch_size), folder):
                summary.done += result is None
                if result is not None:
                    summary.failed[file.name] = result
                    tqdm.write(f"failed: {result}", file=sys.stderr)
                folder.note(file, result)
                bar.update()
    finally:
        folder.write_manifest()  # also when interrupted, so that it is current
    return summary


@dataclass(frozen=True)
class _Input:
    """An image, ready for the network: ``x`` (3, H, W), and its size (H, W) in the file; or the reason why there is none."""

    file: ImageFile
    x: Tensor | None = None
    original: tuple[int, int] = (0, 0)
    error: str = ""


def _inputs(backbone: DiffusionBackbone, files: Iterable[ImageFile], size: int | None) -> Iterator[_Input]:
    preprocess = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)
    advised = size is not None
    for file in files:
        try:
            image = images.load(file.path)
        except ValueError as error:
            yield _Input(file, error=str(error))
            continue
        if not advised and (advice := images.too_large(file.path, image, backbone.declaration)):
            advised = True
            tqdm.write(advice, file=sys.stderr)
        yield _Input(file, preprocess(image), (image.height, image.width))


def _batches(inputs: Iterable[_Input], batch_size: int) -> Iterator[list[_Input]]:
    """Neighbours of equal size, at most ``batch_size`` together; an unreadable image is alone."""
    batch: list[_Input] = []
    for item in inputs:
        if batch and (len(batch) == batch_size or item.x is None or batch[0].x is None or item.x.shape != batch[0].x.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class _Writer:
    """Runs batches and writes what comes out, image by image."""

    def __init__(self, backbone: DiffusionBackbone, settings: Settings, dtype: torch.dtype):
        self.backbone, self.settings, self.dtype = backbone, settings, dtype
        self.device = next(backbone.parameters()).device

    @property
    def precision(self) -> str:
        """What the network computes in, and where."""
        return f"{next(self.backbone.denoiser.parameters()).dtype} on {self.device.type}".removeprefix("torch.")

    def run(self, batches: Iterable[list[_Input]], folder: _Folder) -> Iterator[tuple[ImageFile, str | None]]:
        """Yield every image when its features are on disk, with None, or with the reason why they are not."""
        for batch in batches:
            if batch[0].x is None:
                yield batch[0].file, batch[0].error
                continue
            x = torch.stack([item.x for item in batch if item.x is not None])
            pyramid = self._features(x)
            for i, item in enumerate(batch):
                yield item.file, self._keep(item, [level[i] for level in pyramid], x, folder)

    def _features(self, x: Tensor) -> list[Tensor]:
        """The pyramid of a batch, as it is written; empty if it does not fit the device's memory."""
        try:
            with torch.inference_mode():
                return [level.to(self.dtype).cpu() for level in self.backbone(x.to(self.device))]
        except (RuntimeError, MemoryError) as error:
            if memory.ran_out(error):
                return []
            raise

    def _keep(self, item: _Input, pyramid: Sequence[Tensor], x: Tensor, folder: _Folder) -> str | None:
        """Write one image's maps, (C, h, w) each, or say why not; ``x`` is the batch that it was in."""
        if not pyramid:
            batch = f"a batch of {len(x)} with {x.shape[-1]} x {x.shape[-2]} pixels"
            return f"{item.file.path} does not fit the memory of {self.device}: {batch}; use a smaller --size or --batch-size"
        maps = dict(zip(self.settings.levels, pyramid, strict=True))
        unfit = [name for name, level in maps.items() if not torch.isfinite(level).all()]
        if unfit:
            return f"{item.file.path}: {', '.join(unfit)} has values that {self.settings.dtype} cannot hold; use --dtype bfloat16 or float32"
        _write(folder.target(item.file), maps, self._metadata(item, (x.shape[-2], x.shape[-1])))
        return None

    def _metadata(self, item: _Input, size: tuple[int, int]) -> dict[str, str]:
        settings = self.settings
        return {
            "backbone": self.backbone.declaration.name,
            "recipe_digest": settings.recipe_digest,
            "strides": json.dumps(dict(zip(settings.levels, self.backbone.feature_info.reduction(), strict=True))),
            "original_size": json.dumps(item.original),
            "input_size": json.dumps(size),
            "weights": json.dumps(dict(settings.weights)),
            "settings": settings.digest,
        }


class _Folder:
    """An output folder, its manifest, and which images are finished in it.

    Args:
        path: The folder.
        settings: What its features are made by.
        about: What else the manifest says.
        overwrite: Whether it may hold something else.

    Raises:
        ValueError: It was made by other settings, or its manifest is not whole.
    """

    def __init__(self, path: Path, settings: Settings, about: Mapping[str, Any], overwrite: bool):
        self.path, self.settings, self.about, self.overwrite = path, settings, about, overwrite
        self.images: dict[str, dict[str, str]] = {}
        self.written = 0.0
        before = self._read()
        self.is_new = not before
        differences = _differences(before, settings.as_json()) if before else []
        if differences and not overwrite:
            raise ValueError(f"{path} holds features made by other settings: {'; '.join(differences)}. Choose another folder, or --overwrite.")
        if differences:
            tqdm.write(f"{path} was made by other settings; whatever this call does not replace is still of those", file=sys.stderr)
        elif before:
            self.images = before["images"]

    def _read(self) -> dict[str, Any]:
        """The manifest that is there, or nothing."""
        path = self.path / MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text())
            return {**manifest, "images": dict(manifest["images"])}
        except (ValueError, KeyError, TypeError) as error:
            if self.overwrite:
                return {}
            raise ValueError(f"{path} is not whole ({error!r}), so nothing says how {self.path} was made. Choose another folder, or --overwrite.") from error

    def target(self, file: ImageFile) -> Path:
        """Where an image's features go."""
        return self.path / f"{file.name}.safetensors"

    def finished(self, file: ImageFile) -> bool:
        """Whether the features are there, whole, by these settings."""
        try:
            with safe_open(self.target(file), framework="pt") as opened:
                return (opened.metadata() or {}).get("settings") == self.settings.digest
        except (OSError, SafetensorError):
            return False

    def begin(self, files: Sequence[ImageFile], waiting: Sequence[ImageFile]) -> None:
        """Make the folder, clear what a killed run left half-written, and write the first manifest.

        Raises:
            ValueError: A file is in the way, and no manifest says that this program made it.
            OSError: Something cannot be written.
        """
        foreign = [self.target(file) for file in waiting if self.is_new and not self.overwrite and self.target(file).exists()]
        if foreign:
            raise ValueError(f"{foreign[0]} is in the way, and {self.path} has no {MANIFEST} that says how it was made. Choose another folder, or --overwrite.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path} cannot be made: {error}") from error
        for part in [*self.path.rglob(".*.part"), *self.path.rglob(".tmp??????")]:  # ours, and safetensors' own
            part.unlink()
        self.images |= {file.name: {"status": "done"} for file in files} | {file.name: {"status": "waiting"} for file in waiting}
        self.write_manifest()

    def note(self, file: ImageFile, error: str | None) -> None:
        """Remember what became of an image; the manifest on disk follows every now and then."""
        self.images[file.name] = {"status": "done"} if error is None else {"status": "failed", "error": error}
        if time.monotonic() - self.written > REFRESH:
            self.write_manifest()

    def write_manifest(self) -> None:
        manifest = {
            "library_name": "diffusion_backbones",
            **self.settings.as_json(),
            **self.about,
            "versions": {"diffusion_backbones": __version__} | {name: version(name) for name in LIBRARIES},
            "images": self.images,
        }
        path = self.path / MANIFEST
        part = path.with_name(f".{MANIFEST}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(manifest, indent=1) + "\n")
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}") from error
        self.written = time.monotonic()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = [key for key in now if before.get(key) != now[key]]
    if {"prompt", "timestep"} & set(changed):  # the digest would only repeat what they say
        changed = [key for key in changed if key != "recipe_digest"]
    return [f"{key} was {_say(before.get(key))} and is {_say(now[key])}" for key in changed]


def _say(value: Any) -> str:
    return "the images' own" if value is None else json.dumps(value)


def _write(path: Path, maps: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors.write(path, maps, metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
