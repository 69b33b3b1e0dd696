"""Score activations on a task: the network runs once, and what the task needs of each activation is cached in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops import atomic
from diffusion_backbones.selection.tasks import Task
from diffusion_backbones.spec.activations import Site

DONE = "done.json"
LARGEST = float(np.finfo(np.float16).max)
"""What float16 holds: activations of some networks are larger."""


class FeatureCache:
    """The reduced features of activations in a folder: a file for each, and the number of views that it holds.

    Args:
        folder: Made if it does not exist.
        key: All that the files depend on: network, data, settings.

    Raises:
        ValueError: The folder holds features with another key.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.folder, self.key = folder, json.loads(json.dumps(key))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / DONE).is_file():
            known = json.loads((folder / DONE).read_text())
            if known["key"] != self.key:
                differs = [name for name in self.key if known["key"].get(name) != self.key[name]]
                raise ValueError(
                    f"{folder} holds features with another {', '.join(differs) or 'key'}; choose another folder, or "
                    "remove this one"
                )
            self.looked: dict[str, int] = known["looked"]
        else:
            self.looked = {}

    def __getitem__(self, activation_id: str) -> NDArray[np.floating]:
        """The reduced features of an activation, (views, ...), memory-mapped; float16, or float32 where values are
        larger than that holds.
        """
        array: NDArray[np.floating] = np.load(self._path(activation_id), mmap_mode="r")
        return array

    def _path(self, activation_id: str) -> Path:
        return self.folder / f"{activation_id}.npy"

    @torch.no_grad()
    def gather(
        self,
        backbone: DiffusionBackbone,
        task: Task,
        ids: Sequence[str],
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
        treat: Callable[[Site, Tensor], Tensor] = lambda _, act: act,
    ) -> None:
        """Run the network on every view that is not cached yet. An interrupted run resumes; other ids are added.

        Args:
            backbone: Computes all ``ids``, at its recipe's timestep and with its noise.
            task: Gives the views, and reduces the activations.
            ids: Activation ids.
            progress: Wraps the views, such as ``tqdm``.
            treat: What is done to every activation before it is reduced.
        """
        files: dict[str, Any] = {}
        missing = [name for name in ids if self.looked.get(name, 0) < len(task.views)]
        done = min((self.looked.get(name, 0) for name in missing), default=0)

        for index in progress(range(done, len(task.views)) if missing else ()):

            def keep(site: Site, act: Tensor, index: int = index) -> None:
                kept = task.reduce(index, treat(site, act))
                if site.id not in files:
                    shape = None if done else (len(task.views), *kept.shape)
                    files[site.id] = open_memmap(self._path(site.id), "r+" if done else "w+", np.float16, shape)
                if files[site.id].dtype == np.float16 and np.abs(kept).max() > LARGEST:
                    files[site.id] = _in_float32(files[site.id], self._path(site.id))
                files[site.id][index] = kept

            backbone.visit_activations(task.views[index].to(backbone.device), missing, keep)
            for file in files.values():
                file.flush()
            self._mark(missing, index + 1)

    def _mark(self, ids: Sequence[str], looked: int) -> None:
        self.looked |= dict.fromkeys(ids, looked)
        atomic.write_text(self.folder / DONE, json.dumps({"looked": self.looked, "key": self.key}))


def _in_float32(narrow: NDArray[np.float16], path: Path) -> NDArray[np.float32]:
    """The features of a file in float32, in a file in its place."""
    with atomic.replacing(path) as part:
        wide = open_memmap(part, "w+", np.float32, narrow.shape)
        wide[:] = narrow
        wide.flush()
    return open_memmap(path, "r+")


def single_scores(
    task: Task, cache: FeatureCache, ids: Sequence[str], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, NDArray[np.float64]]:
    """The score of every activation by itself, one for each split."""
    return {name: task.score([cache[name]]) for name in progress(ids)}
