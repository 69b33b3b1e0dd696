"""Score activations on a task: the network looks once, and what the task needs of every activation is kept in files."""

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
from diffusion_backbones.selection.tasks import Task
from diffusion_backbones.spec.activations import Site

DONE = "done.json"


class Evidence:
    """What a task keeps of activations, in a folder: a file for each, and how far the looking has come.

    Args:
        folder: Is made if it is not there. What another network, other data or other settings have left there is an
            error.
        key: All that the files depend on.

    Raises:
        ValueError: The folder holds evidence of something else.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.folder, self.key = folder, json.loads(json.dumps(key))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / DONE).is_file():
            known = json.loads((folder / DONE).read_text())
            if known["key"] != self.key:
                differs = [name for name in self.key if known["key"].get(name) != self.key[name]]
                raise ValueError(
                    f"{folder} holds what another {', '.join(differs) or 'run'} gave; choose another folder, or "
                    "remove this one"
                )
            self.looked: dict[str, int] = known["looked"]
        else:
            self.looked = {}

    def __getitem__(self, id: str) -> NDArray[np.float16]:
        """What was kept of an activation, (looks, ...), read from its file when it is used."""
        array: NDArray[np.float16] = np.load(self.folder / f"{id}.npy", mmap_mode="r")
        return array

    @torch.no_grad()
    def gather(
        self,
        backbone: DiffusionBackbone,
        task: Task,
        ids: Sequence[str],
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
        seed: int = 0,
    ) -> None:
        """Let the network look at everything that it has not looked at yet: an interrupted run goes on where it
        stopped, other ids are added.

        Args:
            backbone: Computes all ``ids``; its recipe's timestep and noise hold.
            task: What is looked at.
            ids: Activation ids.
            progress: Wraps the looks, such as ``tqdm``.
        """
        device = next(backbone.denoiser.parameters()).device
        files: dict[str, Any] = {}
        missing = [id for id in ids if self.looked.get(id, 0) < len(task.looks)]
        done = min((self.looked.get(id, 0) for id in missing), default=0)

        for index in progress(range(done, len(task.looks)) if missing else ()):

            def keep(site: Site, act: Tensor, index: int = index) -> None:
                kept = task.reduce(index, act)
                if site.id not in files:
                    path = self.folder / f"{site.id}.npy"
                    files[site.id] = (
                        open_memmap(path, "r+")
                        if done
                        else open_memmap(path, "w+", np.float16, (len(task.looks), *kept.shape))
                    )
                files[site.id][index] = kept

            backbone.visit_activations(task.looks[index].to(device), missing, keep)
            for file in files.values():
                file.flush()
            self._mark(missing, index + 1)

    def _mark(self, ids: Sequence[str], looked: int) -> None:
        self.looked |= dict.fromkeys(ids, looked)
        new = self.folder / f"{DONE}.new"
        new.write_text(json.dumps({"looked": self.looked, "key": self.key}))
        new.replace(self.folder / DONE)


def scores(
    task: Task, evidence: Evidence, ids: Sequence[str], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, NDArray[np.float64]]:
    """The score of every activation alone, one for each split."""
    return {id: task.score([evidence[id]]) for id in progress(ids)}
