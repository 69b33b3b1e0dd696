"""Tensors that are made of those in a file: what a converter did to names and shapes, repeated when weights are read.

A converter is a function from one ``state_dict`` to another. It runs once on ``meta`` tensors, so nothing is read; of
every tensor that it returns is kept how it is made of stored ones: itself, a view, or several joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_backbones.ops.safetensors_io import TensorFiles

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it."""

    name: str

    def read(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor; ``get`` gives those of the file."""
        return get(self.name)


@dataclass(frozen=True)
class View:
    """A part of a tensor, or the tensor in another shape."""

    of: Stored | Joined
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor; ``get`` gives those of the file."""
        whole = self.of.read(get)
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


@dataclass(frozen=True)
class Joined:
    """Tensors one behind another."""

    parts: tuple[Stored | View | Joined, ...]
    dim: int

    def read(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor; ``get`` gives those of the file."""
        return torch.cat([part.read(get) for part in self.parts], self.dim)


Origin = Stored | View | Joined


class ConvertedFiles(TensorFiles):
    """The tensors that a converter makes of some tensors of one file, unread.

    Args:
        files: The file.
        names: Name that the converter knows -> name in the file.
        converter: Takes and returns a ``state_dict``.

    Raises:
        ValueError: The converter does something else to tensors than to rename, cut and join them.
    """

    def __init__(
        self,
        files: TensorFiles,
        names: Mapping[str, str],
        converter: Callable[[dict[str, Tensor]], State | dict[str, Any]],
    ):
        super().__init__([])
        self.paths = files.paths
        fakes = {new: torch.empty(files.shapes[name], device="meta") for new, name in names.items()}
        with _Watched() as watched:
            converted = {name: tensor for name, tensor in converter(dict(fakes)).items() if tensor is not None}
        own = {id(fake): files.stored(names[new]) for new, fake in fakes.items()}
        self._origins = {n: _alone(_origin(n, tensor, own, watched.joined)) for n, tensor in converted.items()}
        self._where = {name: (self.paths[0], _first(origin)) for name, origin in self._origins.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}

    def _view(self, file: Any, name: str) -> Tensor:
        return self._origins[name].read(file.get_tensor)


class _Watched(TorchFunctionMode):
    """Notes what is joined in its block, and keeps it, so that an ``id`` stays that of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[int, tuple[Tensor, tuple[Tensor, ...], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cat:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            self.joined[id(result)] = result, tuple(args[0] if args else kwargs["tensors"]), dim
        return result


def _origin(
    name: str, tensor: Tensor, own: Mapping[int, str], joined: Mapping[int, tuple[Tensor, tuple[Tensor, ...], int]]
) -> Origin:
    if id(tensor) in own:
        return Stored(own[id(tensor)])
    if id(tensor) in joined:
        _, parts, dim = joined[id(tensor)]
        return Joined(tuple(_origin(name, part, own, joined) for part in parts), dim)
    if tensor._base is None:
        raise ValueError(f"the converter computes {name}, and only renaming, cutting and joining can be repeated")
    of = _origin(name, tensor._base, own, joined)
    assert not isinstance(of, View)  # a base is no view itself
    return View(of, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _alone(origin: Origin) -> Origin:
    """What was joined of one part alone is that part, without a copy."""
    return origin.parts[0] if isinstance(origin, Joined) and len(origin.parts) == 1 else origin


def _first(origin: Origin) -> str:
    while not isinstance(origin, Stored):
        origin = origin.of if isinstance(origin, View) else origin.parts[0]
    return origin.name
