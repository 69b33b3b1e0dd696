"""Lazy, partial and strict loading of ``.safetensors``.

A file is opened, its header is read, and only the tensors that a network still has are taken from it, one at a time, straight
to their device and dtype. Where neither changes, the tensors stay views of the memory-mapped file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_REFUSED = (
    "is a pickle, and loading a pickle runs whatever code it holds. Only .safetensors is read. Convert it once in a place you trust: "
    "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'out.safetensors')`, or take the repository's safetensors files."
)


class TensorFiles:
    """The tensors of one or more ``.safetensors`` files, by name, unread.

    Args:
        paths: The files. A name that occurs in two of them is an error.
        rename: Maps stored names to the names under which they are looked up; a missing name is dropped.

    Raises:
        ValueError: A file is a pickle, empty, cut short, or not in the safetensors format.
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str | None] = lambda name: name):
        self.paths = list(paths)
        self._where: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.paths:
            with _open(path) as file:
                for stored in file.keys():
                    name = rename(stored)
                    if name is None:
                        continue
                    if name in self._where:
                        raise ValueError(f"{path} and {self._where[name][0]} both hold {stored!r}; give one of them")
                    self._where[name] = path, stored
                    self.shapes[name] = tuple(file.get_slice(stored).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def renamed(self, names: Mapping[str, str]) -> TensorFiles:
        """The same files under other names: new name -> name here. What is not listed is dropped."""
        out = TensorFiles([])
        out.paths = self.paths
        out._where = {new: self._where[old] for new, old in names.items()}
        out.shapes = {new: self.shapes[old] for new, old in names.items()}
        return out

    def read(self, names: Iterable[str], dtype: Callable[[str], torch.dtype | None], device: torch.device) -> Iterable[tuple[str, Tensor]]:
        """Yield (name, tensor) one at a time, on ``device``, in ``dtype(name)`` or as stored where that is None."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._where[name][0], []).append(name)
        for path, group in wanted.items():
            for some in _chunks(group, 32):                 # a closed file gives back the pages that a cast has read
                with _open(path) as file:
                    for name in some:
                        tensor = file.get_tensor(self._where[name][1]).reshape(self.shapes[name])
                        target = dtype(name) if tensor.is_floating_point() else None
                        yield name, tensor.to(device=device, dtype=target)
                        del tensor


def _chunks(items: list[str], n: int) -> Iterable[list[str]]:
    return (items[i : i + n] for i in range(0, len(items), n))


def _open(path: Path) -> Any:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} {PICKLE_REFUSED}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        what = "is empty" if size == 0 else f"({size} bytes) is cut short or not in the safetensors format"
        raise ValueError(f"{path} {what}: {error}. Delete it and download or write it again.") from error


def load(module: nn.Module, tensors: TensorFiles, full: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None, device: torch.device, what: str) -> None:
    """Fill ``module`` (usually on ``meta`` and truncated) from files, strictly.

    Args:
        module: Receives exactly the tensors that its ``state_dict`` names.
        tensors: Where they are.
        full: Name -> shape for the whole network before anything was cut off; what files hold beyond it is an error.
        dtype: Of floating-point tensors; None keeps them as stored.
        device: Where they go.
        what: Names the network in errors.

    Raises:
        ValueError: Tensors are missing, not of this network, or of another shape; the first five are named.
    """
    files = ", ".join(str(path) for path in tensors.paths)
    needed = module.state_dict()
    _refuse(f"{what}: missing from {files}", [n for n in needed if n not in tensors], "Is it a checkpoint of another architecture, or is a shard missing?")
    _refuse(f"{what}: not part of this network, in {files}", [n for n in tensors.shapes if n not in full], "Does its config.json belong to these weights?")
    wrong = [f"{n} {s}, expected {full[n]}" for n, s in tensors.shapes.items() if s != full[n]]
    _refuse(f"{what}: of another shape in {files}", wrong, "Does its config.json belong to these weights?")
    owners = dict(module.named_modules())
    for name, tensor in tensors.read(needed, lambda _: dtype, device):
        prefix, _, leaf = name.rpartition(".")
        owner = owners[prefix]
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)


def _refuse(head: str, names: list[str], hint: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{head}: {', '.join(names[:5])}{more}. {hint}")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything a network's ``state_dict`` holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def choose(names: Iterable[str], component: str, stem: str, half: bool) -> list[str]:
    """Which of a repository's files hold a component's weights.

    Args:
        names: All file names, relative to the repository.
        component: Sub-folder, ``unet`` ...
        stem: ``diffusion_pytorch_model`` or ``model``.
        half: Prefer the ``fp16`` variant, otherwise the full precision one; whichever exists is taken.

    Returns:
        One ``.safetensors`` name, or the name of the index of a sharded one.

    Raises:
        FileNotFoundError: There is none; a pickle that is there instead is named.
    """
    inside = [name for name in names if name.startswith(component + "/") and name.count("/") == 1]
    full = [f"{component}/{stem}.safetensors", f"{component}/{stem}.safetensors.index.json"]
    fp16 = [f"{component}/{stem}.fp16.safetensors", f"{component}/{stem}.safetensors.index.fp16.json", f"{component}/{stem}.fp16.safetensors.index.json"]
    for candidate in fp16 + full if half else full + fp16:
        if candidate in inside:
            return [candidate]
    pickles = [name for name in inside if name.endswith(PICKLES)]
    if pickles:
        raise FileNotFoundError(f"{pickles[0]} {PICKLE_REFUSED}")
    raise FileNotFoundError(f"no {component}/{stem}.safetensors (nor its fp16 variant, nor an index of shards); {component}/ holds: {', '.join(inside) or 'nothing'}")


def shards(index: Path) -> list[Path]:
    """The files of a sharded checkpoint.

    Raises:
        ValueError: The index is no index.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards (it needs a 'weight_map'): {error!r}") from error
    return [index.parent / name for name in names]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save a ``.safetensors`` file so that it is either there whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=dict(metadata))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
