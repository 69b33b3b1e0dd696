"""The folder that features are written to: its manifest, and which of its images are finished. Several processes may
work in one folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from tqdm import tqdm

from diffusion_backbones._version import __version__
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.settings import Settings, image_digest
from diffusion_backbones.ops import atomic
from diffusion_backbones.ops.file_formats import safetensors_metadata

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
ABOUT, ORDER = ("recipe", "weights", "device"), "order"
"""Entries of the manifest beside settings, versions and images; the last is for :mod:`.rerun`."""
LIBRARY = "diffusion_backbones"
LIBRARIES = ("torch", "diffusers", "transformers", "timm", "safetensors", "pillow")
REFRESH = 30.0
"""Seconds after which a running extraction writes its manifest again."""
LOOKERS = 8
"""Threads that look which images are finished."""

Images = dict[str, dict[str, str]]
"""Name -> ``status``, ``path`` and ``error`` of every image, as the manifest has them."""


class Folder:
    """An output folder, its manifest, and which of its images are finished.

    Args:
        path: The folder.
        settings: Settings of its features.
        about: Further entries of the manifest.
        overwrite: Whether features with other settings may be replaced.

    Raises:
        ValueError: The folder holds features with other settings, or its manifest is not one or is incomplete.
    """

    def __init__(self, path: Path, settings: Settings, about: Mapping[str, Any], overwrite: bool):
        self.path, self.settings, self.about, self.overwrite = path, settings, about, overwrite
        self.images: Images = {}
        self.under_way: ImageFile | None = None
        self.written = 0.0
        self._kept(self._read())

    def _read(self) -> dict[str, Any]:
        """The manifest on disk, or an empty one.

        Raises:
            ValueError: It is of another program, or incomplete.
        """
        path = self.path / MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            if self.overwrite:
                return {}
            raise ValueError(
                f"{path} is incomplete ({error!r}), so the settings of {self.path} are unknown. Choose another folder, "
                "or --overwrite."
            ) from error
        if not isinstance(manifest, dict) or manifest.get("library_name") != LIBRARY:
            raise ValueError(f"{path} is of another program, and stays as it is. Choose another folder.")
        entries = manifest.get("images")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(f"{path} is incomplete: it does not say which images there are. Choose another folder.")
        return manifest

    def _kept(self, before: Mapping[str, Any]) -> Images:
        """The images of a manifest that stay in it: all if it has these settings.

        Raises:
            ValueError: It has other settings, which may not be replaced.
        """
        differences = self.settings.differences(before) if before else []
        if not differences:
            return dict(before.get("images", {}))
        if not self.overwrite:
            raise ValueError(
                f"{self.path} holds features with other settings: {'; '.join(differences)}. Choose another folder, or "
                "--overwrite."
            )
        return {}

    def target(self, file: ImageFile) -> Path:
        """The file of an image's features."""
        return self.path / f"{file.name}.safetensors"

    def finished(self, file: ImageFile) -> bool:
        """Whether the features exist, are complete, have these settings, and are of this image."""
        try:
            found = safetensors_metadata(self.target(file))
            return found.get("settings") == self.settings.digest and found.get("image") == image_digest(file.path)
        except (OSError, ValueError):
            return False

    def waiting(self, files: Sequence[ImageFile]) -> list[ImageFile]:
        """Those of the files that are not finished."""
        if self.overwrite:
            return list(files)
        with ThreadPoolExecutor(LOOKERS) as pool:
            return [file for file, done in zip(files, pool.map(self.finished, files), strict=True) if not done]

    def obstacle(self, file: ImageFile) -> str:
        """Why no features can be written for an image, or an empty string."""
        target = self.target(file)
        try:
            is_folder = target.is_dir() and not target.is_symlink()
            target.lstat()
        except FileNotFoundError:
            return ""
        except OSError as error:  # a name that is too long, a file where a folder should be
            return f"{file.path}: its features cannot be written to {target}: {error.strerror or error}"
        return f"{file.path}: its features cannot be written to {target}, which is a folder" if is_folder else ""

    def begin(self, files: Sequence[ImageFile], waiting: Sequence[ImageFile]) -> None:
        """Make the folder, remove half-written files of killed runs, and write the first manifest.

        Raises:
            ValueError: A file is in the way that this program did not make, or features of another image; or another
                process has begun with other settings.
            OSError: The folder or the manifest cannot be written.
        """
        before = self._read()
        if not self.overwrite:
            self._check_free(waiting, self._kept(before), has_manifest=bool(before))
        if before and self.settings.differences(before):
            tqdm.write(
                f"{self.path} was made with other settings; whatever this call does not replace keeps those",
                file=sys.stderr,
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path} cannot be made: {error}") from error
        entries = {file.name: _entry(file, "done") for file in files}
        self.images = entries | {file.name: _entry(file, "waiting") for file in waiting}
        self._write(first=True)
        named = {self.path / name for name in (*before.get("images", {}), *self.images)}
        for folder in {self.path, *(name.parent for name in named)}:
            atomic.remove_left_over(folder)

    def _check_free(self, waiting: Sequence[ImageFile], before: Images, has_manifest: bool) -> None:
        for file in waiting:
            target = self.target(file)
            if file.name not in before:
                if _exists(target) and not (has_manifest and _is_ours(target)):
                    raise ValueError(
                        f"{target} is in the way, and no {MANIFEST} in {self.path} says how it was made. Choose "
                        "another folder, or --overwrite."
                    )
            elif other := _another(before[file.name].get("path"), file.path):
                raise ValueError(
                    f"{target} is of another image, {other}, and {file.path} would be kept under the same name; give "
                    "the folder above them, choose another folder for the features, or --overwrite"
                )

    def write(self, file: ImageFile, maps: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an image's maps (C, h, w) atomically: all of them or none.

        Raises:
            OSError: The file cannot be written.
        """
        from diffusion_backbones.ops import safetensors_io  # torch

        path, self.under_way = self.target(file), file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors_io.write(path, maps, {**metadata, "settings": self.settings.digest})
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    def note(self, file: ImageFile, error: str | None) -> None:
        """Record the status of an image; the manifest on disk is written again after :data:`REFRESH` seconds."""
        self.images[file.name] = _entry(file, "done") if error is None else _entry(file, "failed", error=error)
        self.under_way = None
        if time.monotonic() - self.written > REFRESH:
            self.write_manifest()

    def close(self) -> None:
        """Write the manifest, with the image whose features were written when a signal came before its note.

        Raises:
            ValueError: Another process has given the folder other settings.
            OSError: It cannot be written.
        """
        if self.under_way is not None and self.finished(self.under_way):
            self.images[self.under_way.name] = _entry(self.under_way, "done")
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest as it is now, with what other processes have noted in it.

        Raises:
            ValueError: Another process has given the folder other settings.
            OSError: It cannot be written.
        """
        self._write(first=False)

    def _write(self, first: bool) -> None:
        path = self.path / MANIFEST
        try:
            with atomic.holding(self.path):
                manifest = self._manifest(first)
                atomic.write_text(path, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        self.written = time.monotonic()

    def _manifest(self, first: bool) -> dict[str, Any]:
        """The manifest: that on disk, with this run's images. At ``first`` these are as this run found them; later one
        that waits here may have been finished by another process.
        """
        before = self._read()
        if not first and before and self.settings.differences(before):
            raise ValueError(f"another process has begun in {self.path} with other settings, so this one stops")
        known = self._kept(before)
        mine = {name: entry for name, entry in self.images.items() if first or entry["status"] != "waiting"}
        return {
            "library_name": LIBRARY,
            **self.settings.as_json(),
            **self.about,
            "versions": {LIBRARY: __version__} | {name: version(name) for name in LIBRARIES},
            "images": dict(sorted({**self.images, **known, **mine}.items())),
        }


def _entry(file: ImageFile, status: str, **more: str) -> dict[str, str]:
    return {"status": status, "path": str(file.path.absolute()), **more}


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:  # such as a name that is too long, which costs that image later
        return False
    return not path.is_dir()


def _is_ours(path: Path) -> bool:
    """Whether a file holds features that this program wrote."""
    try:
        return {"settings", "recipe_digest"} <= safetensors_metadata(path).keys()
    except (OSError, ValueError):
        return False


def _another(path: str | None, now: Path) -> str:
    """The path that a name stood for, if that image is still there and is not the one that it stands for now."""
    try:
        if not path or Path(path).samefile(now) or image_digest(Path(path)) == image_digest(now):
            return ""
    except OSError:  # moved, or gone
        return ""
    return path
