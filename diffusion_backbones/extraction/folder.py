"""The folder that features are written to: its settings, its manifest, and which of its images are finished."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffusion_backbones._version import __version__
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.ops import atomic, safetensors_io

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "diffusers", "transformers", "timm", "safetensors", "pillow")
HEADER = b'{"__metadata__":{'
"""How the header of a ``.safetensors`` file with metadata begins."""
REFRESH = 30.0
"""Seconds after which a running extraction writes its manifest again."""


@dataclass(frozen=True)
class Settings:
    """All that the features of an image depend on. The features in one folder have the same settings.

    Args:
        backbone: Name of the backbone, without tag.
        tag: Tag of its weights, or empty.
        weights: Where the weights came from, see ``DiffusionBackbone.provenance``.
        recipe_digest: Digest of the recipe, which includes prompt, timestep and noise.
        prompt, timestep: The recipe's, repeated so that an error can name the difference.
        levels: Names of the tensors, fine to coarse.
        size: Side in pixels of the squares that images are resized and cropped to, or None for their own size.
        dtype: Dtype of the tensors, such as ``float16``.
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
        """Twelve hexadecimal digits, which every file with these settings carries."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON holds them, with lists for tuples."""
        return {**asdict(self), "levels": list(self.levels)}


class Folder:
    """An output folder, its manifest, and which of its images are finished.

    Args:
        path: The folder.
        settings: Settings of its features.
        about: Further entries of the manifest.
        overwrite: Whether features with other settings may be replaced.

    Raises:
        ValueError: The folder holds features with other settings, or its manifest is incomplete.
    """

    def __init__(self, path: Path, settings: Settings, about: Mapping[str, Any], overwrite: bool):
        self.path, self.settings, self.about, self.overwrite = path, settings, about, overwrite
        self.images: dict[str, dict[str, str]] = {}
        self.written = 0.0
        before = self._read()
        self.is_new = not before
        differences = _differences(before, settings.as_json()) if before else []
        if differences and not overwrite:
            raise ValueError(
                f"{path} holds features with other settings: {'; '.join(differences)}. Choose another folder, or "
                "--overwrite."
            )
        if differences:
            tqdm.write(
                f"{path} was made with other settings; whatever this call does not replace keeps those",
                file=sys.stderr,
            )
        elif before:
            self.images = before["images"]

    def _read(self) -> dict[str, Any]:
        """The manifest on disk, or an empty one."""
        path = self.path / MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text())
            return {**manifest, "images": dict(manifest["images"])}
        except (ValueError, KeyError, TypeError) as error:
            if self.overwrite:
                return {}
            raise ValueError(
                f"{path} is incomplete ({error!r}), so the settings of {self.path} are unknown. Choose another folder, "
                "or --overwrite."
            ) from error

    def target(self, file: ImageFile) -> Path:
        """The file of an image's features."""
        return self.path / f"{file.name}.safetensors"

    def finished(self, file: ImageFile) -> bool:
        """Whether the image's features exist, are complete, and have these settings."""
        try:
            with safe_open(self.target(file), framework="pt") as opened:
                return (opened.metadata() or {}).get("settings") == self.settings.digest
        except (OSError, SafetensorError):
            return False

    def begin(self, files: Sequence[ImageFile], waiting: Sequence[ImageFile]) -> None:
        """Make the folder, remove half-written files of a killed run, and write the first manifest.

        Raises:
            ValueError: A file is in the way, and there is no manifest to show that this program made it.
            OSError: The folder or the manifest cannot be written.
        """
        foreign = [
            self.target(file) for file in waiting if self.is_new and not self.overwrite and self.target(file).exists()
        ]
        if foreign:
            raise ValueError(
                f"{foreign[0]} is in the way, and {self.path} has no {MANIFEST} to say how it was made. Choose "
                "another folder, or --overwrite."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path} cannot be made: {error}") from error
        for path in filter(_is_left_over, self.path.rglob(".*")):
            path.unlink()
        self.images |= {file.name: {"status": "done"} for file in files} | {
            file.name: {"status": "waiting"} for file in waiting
        }
        self.write_manifest()

    def write(self, file: ImageFile, maps: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an image's maps (C, h, w) atomically: all of them or none.

        Raises:
            OSError: The file cannot be written.
        """
        path = self.target(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors_io.write(path, maps, {**metadata, "settings": self.settings.digest})
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    def note(self, file: ImageFile, error: str | None) -> None:
        """Record the status of an image; the manifest on disk is written again after :data:`REFRESH` seconds."""
        self.images[file.name] = {"status": "done"} if error is None else {"status": "failed", "error": error}
        if time.monotonic() - self.written > REFRESH:
            self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest as it is now.

        Raises:
            OSError: It cannot be written.
        """
        manifest = {
            "library_name": "diffusion_backbones",
            **self.settings.as_json(),
            **self.about,
            "versions": {"diffusion_backbones": __version__} | {name: version(name) for name in LIBRARIES},
            "images": self.images,
        }
        path = self.path / MANIFEST
        try:
            atomic.write_text(path, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        self.written = time.monotonic()


def _is_left_over(path: Path) -> bool:
    """Whether a killed run left a file half-written: one of ours, or one that safetensors was about to rename to one of
    ours.
    """
    if target := atomic.target_of(path):
        return (target.name == MANIFEST or target.suffix == ".safetensors") and path.is_file()
    if not re.fullmatch(r"\.tmp[0-9A-Za-z]{6}", path.name) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8 + len(HEADER))[8:] == HEADER  # the header's length comes first


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = [key for key in now if before.get(key) != now[key]]
    if {"prompt", "timestep"} & set(changed):  # the digest would only repeat what they say
        changed = [key for key in changed if key != "recipe_digest"]
    return [f"{key} was {_say(before.get(key))} and is {_say(now[key])}" for key in changed]


def _say(value: Any) -> str:
    return "the images' own" if value is None else json.dumps(value)
