"""A run that finds everything finished, without loading the network.

The settings of features name weights by their content in memory, so only who has loaded them knows the settings. But
the same order, with the same files, versions and devices, gives the same settings. So a manifest notes a digest of all
these; a run that finds its own there has the settings of the manifest. Whatever differs is loaded and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusion_backbones.extraction.folder import ABOUT, LIBRARIES, MANIFEST, ORDER, Folder
from diffusion_backbones.extraction.images import ImageFile
from diffusion_backbones.extraction.settings import Settings
from diffusion_backbones.spec.registry import get_declaration, list_fusions

PACKAGE = Path(__file__).parent.parent
COMPUTING = (*LIBRARIES, "accelerate", "peft", "tokenizers", "torchao")
"""Distributions that may change what is built."""
ENVIRONMENT = (
    "CUDA_",
    "HIP_",
    "ROCR_",
    "ZE_",
    "ONEAPI_",
    "PYTORCH_",
    "HF_",
    "HUGGINGFACE_",
    "XDG_CACHE_HOME",
    "DIFFUSION_BACKBONES_",
)
"""How variables begin that say which devices are seen, and where files are."""
DEV, DEVICES = Path("/dev"), ("nvidia", "kfd", "dri", "dxg", "accel")
"""Where systems list devices, and how the names of accelerators begin there."""


class Order:
    """What a run was asked for, and what that stands for at this moment: files by identity, size and times.

    A file whose time of change is the same has the same content, since no program can set that time; see
    :func:`diffusion_backbones.loading.fingerprint.content`.

    Args:
        name: A registered backbone, or its place.
        asked: The options that settings follow from, ``device``, ``checkpoint_path``, ``random_weights`` and
            ``encoder`` among them.
    """

    def __init__(self, name: str, asked: Mapping[str, Any]):
        self.name, self.asked = name, asked
        self.folder = name.partition("local-dir:")[2]
        places = [Path(os.path.expanduser(place)) for place in (asked["checkpoint_path"], self.folder) if place]
        files = [*_sources(), *(path for place in places for path in _files(place))]
        self._state = {
            "name": name,
            "asked": {key: str(value) for key, value in asked.items()},
            "files": {str(path): _identity(path) for path in files},
            "versions": {"python": sys.version, **{library: _version(library) for library in COMPUTING}},
            "environment": {key: value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)},
            "machine": [platform.node(), platform.machine(), platform.release(), *_devices()],
        }

    @property
    def repositories(self) -> dict[str, str] | None:
        """Repository on the hub -> revision, of all that weights are read from; None where that, or the device that
        ``auto`` stands for, is not known without PyTorch.
        """
        if self.name.startswith("hf-hub:") or not (DEV.is_dir() or self.asked["device"] == "cpu"):
            return None
        if self.folder or self.asked["checkpoint_path"] or self.asked["random_weights"]:
            return {}
        if "+" in self.name or self.name in list_fusions():  # timm may have members from elsewhere
            return None
        checkpoint = get_declaration(self.name).checkpoint
        tiny = checkpoint.tiny_encoder.file if checkpoint.tiny_encoder and self.asked["encoder"] else None
        found = {file.repo: file.revision for file in (checkpoint.denoiser, tiny) if file}
        return {checkpoint.hub_id: checkpoint.revision, **found} if checkpoint.hub_id else found

    def digest(self, commits: Mapping[str, str]) -> str:
        """Names all that the settings follow from.

        Args:
            commits: Repository -> commit, of :attr:`repositories`.
        """
        cached = [path for repo, commit in commits.items() for path in _files(_snapshot(repo, commit))]
        state = {**self._state, "commits": commits, "cached": {str(path): _identity(path) for path in cached}}
        text = json.dumps(state, sort_keys=True)
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()

    def note(self, provenance: Mapping[str, str]) -> str | None:
        """The digest for a manifest, once the weights have been read; None where :meth:`now` could not find it.

        Args:
            provenance: Where they were read: of another place than was asked first, such as a mirror, nothing is noted.
        """
        places = {} if self.folder else {key: place for key, place in provenance.items() if key.endswith("repo")}
        commits = {place: provenance[key.removesuffix("repo") + "commit"] for key, place in places.items()}
        known = self.repositories
        return self.digest(commits) if known is not None and known.keys() == commits.keys() else None

    def now(self) -> str | None:
        """The same before they are read. The hub is asked which commit a branch is at; a commit is its own answer.

        Raises:
            ConnectionError: It does not say, nor does the cache.
        """
        known = self.repositories
        return None if known is None else self.digest({repo: _commit(repo, at) for repo, at in known.items()})


def all_finished(order: Order, files: Sequence[ImageFile], out: Path) -> bool:
    """Whether a folder has the features of all files as they were ordered; then its manifest is brought up to date.

    Returns False wherever that is not sure, and leaves what is wrong to the run that loads the network.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
        if not manifest[ORDER] or manifest[ORDER] != order.now():
            return False
        settings = Settings(**{field.name: manifest[field.name] for field in fields(Settings)})
        folder = Folder(out, settings, {key: manifest[key] for key in (*ABOUT, ORDER)}, overwrite=False)
        if folder.waiting(files):
            return False
        folder.begin(files, [])
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or one that the run will complain of
        return False
    return True


def _sources() -> Iterator[Path]:
    """The files of this package, without what Python compiled."""
    for folder, below, names in os.walk(PACKAGE):
        below[:] = [name for name in below if name != "__pycache__"]
        yield from (Path(folder, name) for name in names)


def _files(place: Path) -> Iterator[Path]:
    """A file; or those of a folder and its sub-folders, which is as deep as the diffusers layout goes."""
    if place.is_file():
        yield place
    for depth in ("*", "*/*"):
        yield from (path for path in place.glob(depth) if path.is_file())


def _commit(repo: str, revision: str) -> str:
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision

    from diffusion_backbones.loading.hub import HubRepo  # the hub's client takes a third of a second

    return HubRepo(repo, revision).commit


def _snapshot(repo: str, commit: str) -> Path:
    """Where the hub's client keeps a commit."""
    from huggingface_hub import constants  # heavy

    folder = constants.REPO_ID_SEPARATOR.join(["models", *repo.split("/")])
    return Path(constants.HF_HUB_CACHE, folder, "snapshots", commit)


def _identity(path: Path) -> list[int]:
    """Device, number, size and times; nothing of a link that leads nowhere, or of a file that is gone by now."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def _devices() -> list[str]:
    """The nodes of accelerators, by which one that came or went is noticed."""
    return sorted(node.name for node in DEV.glob("*") if node.name.startswith(DEVICES))
