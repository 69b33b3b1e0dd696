"""Lazy, partial and strict loading of ``.safetensors``, and writing them whole or not at all.

A file is opened, its header is read, and only the tensors that a network still has are taken from it, one at a time,
straight to their device and dtype.

Small files are copied into memory. A view of a memory-mapped file lies where the file's header put it, and the same
weights at another alignment give other last digits (2e-6 was seen), so copies make features equal bit for bit wherever
weights were stored. From :data:`MAP_FROM` bytes on, weights that stay on the CPU in their own dtype stay views, as in
diffusers: loading takes no time, processes share the pages, and only the file's last digits are its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_backbones.ops import atomic

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

Store = Callable[[str, Tensor], Tensor]
"""Name of a tensor, and the tensor as it was read -> what is kept of it."""

MAP_FROM = 2**28
"""Size in bytes from which a file's weights are used where they are mapped."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_REFUSED = (
    "is a pickle, and loading a pickle runs whatever code it holds. Only .safetensors is read. Convert it once in a "
    "place you trust: "
    "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'out.safetensors')`, or take the repository's "
    "safetensors files."
)
_LFS_POINTER = b"version https://git-lfs"


class TensorFiles:
    """The tensors of one or more ``.safetensors`` files, by name, unread.

    Args:
        paths: The files.
        rename: Maps stored names to the names under which they are looked up; None drops one.

    Attributes:
        shapes: Name -> shape.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is a pickle, empty, cut short, or not in the safetensors format; or two files hold the same
            name.
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str | None] = lambda name: name):
        self.paths = list(paths)
        self._where: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.paths:
            with _open(path) as file:
                for stored in file.keys():  # noqa: SIM118  (an open file is not a mapping)
                    name = rename(stored)
                    if name is None:
                        continue
                    if name in self._where:
                        raise ValueError(f"{path} and {self._where[name][0]} both hold {stored!r}; give one of them")
                    self._where[name] = path, stored
                    self.shapes[name] = tuple(file.get_slice(stored).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self.paths)

    def renamed(self, names: Mapping[str, str]) -> TensorFiles:
        """The same files under other names: new name -> name here. Tensors that are not listed are dropped."""
        out = TensorFiles([])
        out.paths = self.paths
        out._where = {new: self._where[old] for new, old in names.items()}
        out.shapes = {new: self.shapes[old] for new, old in names.items()}
        return out

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        path, stored = self._where[name]
        with _open(path) as file:
            found: torch.dtype = file.get_tensor(stored).dtype  # mapped, not read
        return found

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) one at a time, on ``device``; floating-point ones in ``dtype``, or as stored where that
        is None.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._where[name][0], []).append(name)
        for path, group in wanted.items():
            copy = path.stat().st_size < MAP_FROM
            mapped = not copy and device.type == "cpu" and dtype in (None, self.dtype(group[0]))
            for some in _chunks(
                group, len(group) if mapped else 32
            ):  # closing a file gives back the pages that were read
                with _open(path) as file:
                    for name in some:
                        view = file.get_tensor(self._where[name][1]).reshape(self.shapes[name])
                        tensor = view.to(device=device, dtype=dtype if view.is_floating_point() else None, copy=copy)
                        del view
                        yield name, tensor


def _chunks(items: Sequence[str], n: int) -> Iterator[Sequence[str]]:
    return (items[i : i + n] for i in range(0, len(items), n))


def _open(path: Path) -> Any:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} {PICKLE_REFUSED}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {_what_is_wrong(path)}: {error}.") from error


def _what_is_wrong(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "is empty; delete it and download or write it again"
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return (
                "is a git-lfs pointer and not the file itself; run `git lfs pull` where it was cloned, or download it"
            )
    return f"({size} bytes) is cut short or not in the safetensors format; delete it and download or write it again"


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """Build networks on ``meta`` for :func:`load` to fill, without initializing weights that do not exist, which takes
    a third of the time.
    """
    with torch.device("meta"), _NoInit():
        yield


def as_read(_name: str, tensor: Tensor) -> Tensor:
    """Keep a tensor as it is."""
    return tensor


def load(
    module: nn.Module,
    files: TensorFiles,
    full: Shapes,
    dtype: torch.dtype | None,
    device: torch.device,
    what: str,
    store: Store = as_read,
) -> None:
    """Fill ``module`` (usually :func:`unfilled` and truncated) from files, strictly. At most one tensor is in memory
    twice.

    Args:
        module: Receives exactly the tensors that its ``state_dict`` names.
        files: The files that hold them.
        full: The whole network before anything was cut off; other tensors in the files are an error.
        dtype: Target dtype of floating-point tensors; None keeps the stored one.
        device: Target device.
        what: Names the network in errors.
        store: Turns each tensor, by its name, into what is kept of it.

    Raises:
        ValueError: Tensors are missing, not of this network, or of another shape; the first five are named.
    """
    needed = list(module.state_dict())
    check_tensors(needed, files.shapes, full, what, str(files))
    fill(module, ((name, store(name, tensor)) for name, tensor in files.read(needed, dtype, device)))


def check_tensors(needed: Iterable[str], found: Shapes, full: Shapes, what: str, where: str) -> None:
    """Check that the tensors that were found are those of a network.

    Args:
        needed: Names that must be found.
        found: The tensors that were found.
        full: The tensors that may be found.
        what: Names the network in errors.
        where: Names the files in errors.

    Raises:
        ValueError: See :func:`load`.
    """
    missing = [name for name in needed if name not in found]
    foreign = [name for name in found if name not in full]
    wrong = [
        f"{name} {found[name]}, expected {full[name]}" for name in found if name in full and found[name] != full[name]
    ]
    _refuse(
        f"{what}: missing from {where}", missing, "Is it a checkpoint of another architecture, or is a shard missing?"
    )
    _refuse(f"{what}: not part of this network, in {where}", foreign, "Does its config.json belong to these weights?")
    _refuse(f"{what}: of another shape in {where}", wrong, "Does its config.json belong to these weights?")


def _refuse(head: str, names: list[str], hint: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{head}: {', '.join(names[:5])}{more}. {hint}")


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors in the place of a network's parameters (frozen) and buffers, by their names in its ``state_dict``."""
    owners = dict(module.named_modules())
    for name, tensor in tensors:
        prefix, _, leaf = name.rpartition(".")
        owner = owners[prefix]
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything a network's ``state_dict`` holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save a ``.safetensors`` file so that it is either there whole or as it was; also over a file that is open. The
    same tensors and metadata give the same bytes.

    Raises:
        OSError: It cannot be written: no permission, no space, no folder.
    """
    from safetensors.torch import save

    try:
        data = _ordered(save(_apart(tensors), dict(metadata)))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    with atomic.replacing(path) as part:
        part.write_bytes(data)


def _ordered(data: bytes) -> bytes:
    """A file with its metadata in alphabetical order; safetensors writes them in another order every time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # what comes behind it is aligned
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_part(part: Path, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save a ``.safetensors`` file at the temporary path that :func:`~diffusion_backbones.ops.atomic.replacing` gives
    for ``path``, without a copy of it in memory.

    Raises:
        OSError: It cannot be written; the message names ``path``.
    """
    from safetensors.torch import save_file

    try:
        save_file(_apart(tensors), part, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous; those that share memory are each written in full."""
    apart: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in memory else tensor.contiguous()
        memory.add(address)
    return apart
