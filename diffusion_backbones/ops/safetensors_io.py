"""Lazy, partial and strict loading of ``.safetensors``, and writing them whole or not at all.

A file is opened, its header is read, and only the tensors that a network still has are taken from it, one at a time,
straight to their device and dtype.

Small files are copied into memory. A view of a memory-mapped file lies where the file's header put it, and the same
weights at another alignment give other last digits (2e-6 was seen), so copies make features equal bit for bit wherever
weights were stored. From :data:`MAP_FROM` bytes on, weights that stay on the CPU in their own dtype stay views, as in
diffusers: loading copies nothing, processes share the pages, and only the file's last digits are its own. Every tensor
is looked through once for NaN and infinity.
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
from diffusion_backbones.ops.file_formats import PICKLES, is_safetensors, what_is_wrong

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

Store = Callable[[str, Tensor], Tensor]
"""Name of a tensor, and the tensor as it was read -> what is kept of it."""

HINT = "Does its config.json belong to these weights?"
MAP_FROM = 2**28
"""Size in bytes from which a file's weights are used where they are mapped."""

_SCALES = (
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    *(".SCB", ".weight_format", ".qweight", ".qzeros", ".g_idx"),
    *(".scale_weight", ".weight_scale", ".weight_scale_inv", ".scale_input", ".input_scale", "scaled_fp8"),
    *(".comfy_quant", ".weight_scale_2"),
)
"""Ends of the names of what belongs to quantized weights: bitsandbytes, GPTQ and AWQ, scaled float8."""
_QUANTIZED = (
    "They are of quantized weights, which are not read. Give those in float32, float16 or bfloat16; "
    "weight_dtype='int8' quantizes them as they are read."
)


class TensorFiles:
    """The tensors of one or more ``.safetensors`` files, by name, unread.

    Args:
        paths: The files.
        rename: Maps stored names to the names under which they are looked up; None drops one.

    Attributes:
        shapes: Name -> shape.
        hint: Why its tensors may not fit a network, as a question.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is a pickle, empty, cut short, or not in the safetensors format; or two files hold the same
            name.
    """

    hint = HINT

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

    def _view(self, file: Any, name: str) -> Tensor:
        """A tensor as its open file has it, mapped and not read."""
        view: Tensor = file.get_tensor(self._where[name][1])
        return view

    def stored(self, name: str) -> str:
        """The name under which a tensor is in its file; the name itself if it is in none."""
        return self._where[name][1] if name in self._where else name

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

        Raises:
            ValueError: A tensor holds NaN or infinity.
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
                        view = self._view(file, name).reshape(self.shapes[name])
                        tensor = view.to(device=device, dtype=dtype if view.is_floating_point() else None, copy=copy)
                        check_finite(tensor, name, str(path), view)
                        del view
                        yield name, tensor


def check_finite(tensor: Tensor, name: str, where: str, stored: Tensor | None = None) -> None:
    """Check that a weight is finite, in one pass over it and without a copy.

    Args:
        tensor: The weight in the dtype that is computed in.
        name: Its name.
        where: Names its file in errors.
        stored: The weight as its file holds it.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel() or _is_finite(tensor):
        return
    if stored is not None and _is_finite(stored):
        raise ValueError(f"{name} in {where} has values that {tensor.dtype} cannot hold; use bfloat16 or float32")
    raise ValueError(f"{name} in {where} holds NaN or infinity, so every feature would; download or make it again")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.itemsize == 1:  # float8, in which nothing is computed
        tensor = tensor.float()
    least, most = torch.aminmax(tensor)  # NaN is both
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _chunks(items: Sequence[str], n: int) -> Iterator[Sequence[str]]:
    return (items[i : i + n] for i in range(0, len(items), n))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder" if path.is_dir() else f"{path} does not exist")
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a safetensors file under another suffix; rename it to {path.stem}.safetensors"
            if is_safetensors(path)
            else f"{path} {what_is_wrong(path)}"
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {what_is_wrong(path)} ({error})") from error


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """Build networks on ``meta``, to be filled by :func:`load` or to be looked at, without initializing weights that do
    not exist, which takes a third of the time.
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
        ValueError: Tensors are missing, not of this network, of another shape, or no numbers that are computed with;
            the first five are named.
    """
    empty = module.state_dict()
    check_tensors(empty, files.shapes, full, what, str(files), files.stored, files.hint)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files.read(empty, dtype, device):
            check_floating({name: tensor.dtype}, empty, what, str(files))
            yield name, store(name, tensor)

    fill(module, stored())


def check_floating(found: Mapping[str, torch.dtype], wanted: Mapping[str, Tensor], what: str, where: str) -> None:
    """Check that weights are stored as floating-point numbers, and not as whole ones without their scales.

    Args:
        found: Name -> the dtype that it is stored in.
        wanted: Name -> the tensor of the network.
        what: Names the network in errors.
        where: Names the files in errors.

    Raises:
        ValueError: See :func:`load`.
    """
    whole = [
        f"{name} ({dtype})"
        for name, dtype in found.items()
        if name in wanted and wanted[name].is_floating_point() and not dtype.is_floating_point
    ]
    _refuse(f"{what}: stored as whole numbers in {where}", whole, _QUANTIZED)


def check_tensors(
    needed: Iterable[str],
    found: Shapes,
    full: Shapes,
    what: str,
    where: str,
    stored: Callable[[str], str] = str,
    hint: str = HINT,
) -> None:
    """Check that the tensors that were found are those of a network.

    Args:
        needed: Names that must be found.
        found: The tensors that were found.
        full: The tensors that may be found.
        what: Names the network in errors.
        where: Names the files in errors.
        stored: Name of a tensor that was found -> its name in the files.
        hint: What may be the reason.

    Raises:
        ValueError: See :func:`load`.
    """
    missing = [name for name in needed if name not in found]
    foreign = [stored(name) for name in found if name not in full]
    wrong = [
        f"{stored(name)} {found[name]}, expected {full[name]}"
        for name in found
        if name in full and found[name] != full[name]
    ]
    _refuse(
        f"{what}: missing from {where}", missing, "Is it a checkpoint of another architecture, or is a shard missing?"
    )
    scales = [name for name in foreign if name.endswith(_SCALES)]
    _refuse(f"{what}: not part of this network, in {where}", scales or foreign, _QUANTIZED if scales else hint)
    _refuse(f"{what}: of another shape in {where}", wrong, hint)


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
