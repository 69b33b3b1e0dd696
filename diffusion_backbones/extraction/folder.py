"""The folder that features go to: its settings, its manifest, and which images are finished in it."""

from __future__ import annotations

import hashlib
import json
import os
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
from diffusion_backbones.ops import safetensors_io

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


class Folder:
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
            raise ValueError(
                f"{path} holds features made by other settings: {'; '.join(differences)}. Choose another folder, or "
                "--overwrite."
            )
        if differences:
            tqdm.write(
                f"{path} was made by other settings; whatever this call does not replace is still of those",
                file=sys.stderr,
            )
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
            raise ValueError(
                f"{path} is not whole ({error!r}), so nothing says how {self.path} was made. Choose another folder, "
                "or --overwrite."
            ) from error

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
        foreign = [
            self.target(file) for file in waiting if self.is_new and not self.overwrite and self.target(file).exists()
        ]
        if foreign:
            raise ValueError(
                f"{foreign[0]} is in the way, and {self.path} has no {MANIFEST} that says how it was made. Choose "
                "another folder, or --overwrite."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path} cannot be made: {error}") from error
        for part in [*self.path.rglob(".*.part"), *self.path.rglob(".tmp??????")]:  # ours, and safetensors' own
            part.unlink()
        self.images |= {file.name: {"status": "done"} for file in files} | {
            file.name: {"status": "waiting"} for file in waiting
        }
        self.write_manifest()

    def write(self, file: ImageFile, maps: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an image's maps (C, h, w), so that they are there whole or not at all.

        Raises:
            OSError: They cannot be written.
        """
        path = self.target(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors_io.write(path, maps, {**metadata, "settings": self.settings.digest})
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} cannot be written: {error}") from error

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
