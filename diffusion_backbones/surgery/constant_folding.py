"""Keep what does not depend on the image as values, and drop the weights that computed it.

A backbone reads one prompt at one timestep, so the embedding of the timestep, the keys and values of the text, the
modulations of a transformer and more are the same for every image. Which modules those are is found by running the
network on latents of NaN: whatever depends on an image by any arithmetic is NaN then. What holds no NaN, and is bit for
bit the same at two sizes, is constant, and the outermost such modules with matrices are replaced by :class:`Constant`.
Where a recipe has several timesteps, a constant has a row for each of them, unless all are equal. Nothing here knows a
family.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_backbones.families import Architecture
from diffusion_backbones.ops.noise import timesteps as rows
from diffusion_backbones.spec.activations import Site

SIZES = ((2, 1), (1, 3))
"""Heights and widths that networks are run at, in units of their ``size_divisibility``: no side, ratio or area is in
both.
"""
COSTLY = (F.linear, F.conv2d, F.scaled_dot_product_attention)


class _Step(threading.local):
    """Which of the recipe's timesteps the call in this thread is at: (1,) int64; None outside calls."""

    row: Tensor | None = None


_STEP = _Step()


@contextmanager
def at_step(step: int, network: nn.Module) -> Iterator[None]:
    """Within the ``with`` block, constants of this thread's calls give what belongs to a timestep, by its position.

    Args:
        step: Position among the timesteps that the network was folded at.
        network: That has constants.
    """
    outer = _STEP.row
    _STEP.row = torch.full((1,), step, device=next(network.parameters()).device)  # filled there: nothing is copied
    try:
        yield
    finally:
        _STEP.row = outer


class Constant(nn.Module):
    """Stands in for a module that gives the same for every image: returns copies of its outputs, one for each image.

    Args:
        outputs: What the module gave for one image; None where it gave None.
        axes: Of each output the axis along which images are put together; None if it is the same for any number of
            them.
        counted: Where the number of images is read: an argument's position or name, its axis, and its length for one
            image.
        as_tuple: Whether the outputs are a tuple and not the only one.
        by_step: Whether outputs have an axis of timesteps in front of all others; see :func:`at_step`.
    """

    by_step: bool = False

    def __init__(
        self,
        outputs: Iterable[Tensor | None],
        axes: Iterable[int | None],
        counted: tuple[int | str, int, int] | None,
        as_tuple: bool,
        by_step: bool = False,
    ):
        super().__init__()
        self.axes, self.counted, self.as_tuple, self.by_step = tuple(axes), counted, as_tuple, by_step
        for i, output in enumerate(outputs):
            self.register_buffer(f"output{i}", output)

    @property
    def outputs(self) -> list[Tensor | None]:
        """What the module gave for one image, at each timestep if that makes a difference."""
        return [getattr(self, f"output{i}") for i in range(len(self.axes))]

    @property
    def out_features(self) -> int:
        """As in nn.Linear, so that a network can be cut after it was folded."""
        return next(output.shape[-1] for output in self.outputs if output is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Copies of the outputs, one for each image."""
        images = 1
        if self.counted is not None:
            key, axis, length = self.counted
            images = (args[key] if isinstance(key, int) else kwargs[key]).shape[axis] // length
        rows = [self._at_step(output) for output in self.outputs] if self.by_step else self.outputs
        outputs = tuple(_repeat(output, axis, images) for output, axis in zip(rows, self.axes, strict=True))
        return outputs if self.as_tuple else outputs[0]

    def _at_step(self, output: Tensor | None) -> Tensor | None:
        if _STEP.row is None:
            raise RuntimeError("a network folded at several timesteps runs only inside a call of its backbone")
        return None if output is None else output.index_select(0, _STEP.row)[0]

    def describe(self) -> dict[str, Any]:
        """What :func:`restore` needs, for JSON."""
        shapes = [None if output is None else list(output.shape) for output in self.outputs]
        return {
            "outputs": shapes,
            "axes": list(self.axes),
            "counted": self.counted and list(self.counted),
            "tuple": self.as_tuple,
            **({"by_step": True} if self.by_step else {}),
        }


def _repeat(output: Tensor | None, axis: int | None, images: int) -> Tensor | None:
    """A copy, which the network may write to, with a stride for every image, as the stock module gives it."""
    return None if output is None else output.repeat([images if i == axis else 1 for i in range(output.ndim)])


def constants(network: nn.Module) -> dict[str, Constant]:
    """Path -> what stands there in place of a stock module."""
    return {path: module for path, module in network.named_modules() if isinstance(module, Constant)}


def describe(network: nn.Module) -> dict[str, Any]:
    """Path -> :meth:`Constant.describe`, empty for a network that is not folded."""
    return {path: constant.describe() for path, constant in constants(network).items()}


def restore(network: nn.Module, described: Mapping[str, Any]) -> None:
    """Put constants without values, on the default device, where :func:`describe` says that they were.

    Raises:
        ValueError: The network has no such module, or the description is not whole.
    """
    for path, what in described.items():
        try:
            outputs = [None if shape is None else torch.zeros(shape) for shape in what["outputs"]]
            counted = what["counted"] and tuple(what["counted"])
            constant = Constant(outputs, what["axes"], counted, what["tuple"], what.get("by_step", False))
            network.set_submodule(path, constant)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the folded network cannot be restored: {path!r} is not described as a module of it ({error})"
            ) from error


def check_fold(fold: Any, folded: Mapping[str, Any], trainable: Any, device: torch.device, name: str) -> None:
    """Check that a backbone can be folded as asked; ``folded`` describes one that already is.

    Raises:
        TypeError: ``fold`` is not a bool, or something is to be trained.
        ValueError: There are no weights, on ``meta``.
    """
    if not isinstance(fold, bool):
        raise TypeError(f"fold must be True or False, got {fold!r}")
    if trainable and (fold or folded):
        raise TypeError(
            f"{name}: trainable={trainable!r} needs the weights that fold=True drops; train it without fold=True, and "
            "fold what was trained"
        )
    if fold and not folded and device.type == "meta":
        raise ValueError(
            f"{name}: fold=True keeps values, and on the meta device there are none; build it on another, or read a "
            "folded one that was saved"
        )


def fold(
    denoiser: nn.Module,
    network: Architecture,
    conditioning: Mapping[str, Tensor],
    timesteps: Sequence[float],
    sites: Iterable[Site],
) -> None:
    """Replace what does not depend on the image, in place. The network is run three times at every timestep, on few
    pixels, and mostly without computing anything.

    Args:
        denoiser: A network with weights, possibly truncated.
        network: Its architecture.
        conditioning: Tensors of :attr:`Architecture.conditioning_shapes`, (1, ...) each.
        timesteps: What the network receives, one after another.
        sites: Activations that may be asked for; no module around what they are read from is replaced.
    """
    denoiser.eval()
    read = {path for site in sites for path in (*site.modules, site.modulation)}
    candidates = {path: module for path, module in denoiser.named_modules() if _foldable(path, module, read)}
    first = next(denoiser.parameters())

    def run(timestep: float, images: int, size: tuple[int, int]) -> dict[str, list[_Output | None]]:
        height, width = (n * network.size_divisibility for n in size)
        stride = network.latent_stride
        z = first.new_full((images, network.latent_channels, height // stride, width // stride), torch.nan)
        seen: dict[str, list[_Output | None]] = {path: [] for path in candidates}
        hooks = [
            module.register_forward_hook(functools.partial(_keep, seen[path]), with_kwargs=True)
            for path, module in candidates.items()
        ]
        try:
            with torch.no_grad(), z.device, _NothingFromNaN():
                given = {
                    name: tensor.to(z.device).repeat(images, *[1] * (tensor.ndim - 1))
                    for name, tensor in conditioning.items()
                }
                network.call(denoiser, z, rows(timestep, images, z.device), given, (height, width))
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def found(timestep: float) -> dict[str, Constant | None]:
        runs = [run(timestep, *which) for which in ((1, SIZES[0]), (2, SIZES[0]), (2, SIZES[1]))]
        return {path: _constant(*(seen[path] for seen in runs)) for path in candidates}

    each = [found(timestep) for timestep in timesteps]
    for path, module in candidates.items():  # what is outside comes before what is inside, and takes that along
        constant = _by_step([constants[path] for constants in each])
        if constant is not None and module in set(denoiser.modules()):
            denoiser.set_submodule(path, constant)


def _foldable(path: str, module: nn.Module, read: Collection[str]) -> bool:
    """Whether a module holds a matrix; norms alone cost less than their outputs would."""
    return (
        bool(path)
        and any(p.ndim > 1 for p in module.parameters())
        and not any(inside.startswith(f"{path}.") for inside in read)
    )


class _NothingFromNaN(TorchFunctionMode):
    """The costly operations give NaN, of the right shape, for whatever holds one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        spoilt = (
            [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.isnan().any()]
            if func in COSTLY
            else []
        )
        if spoilt:
            like = func(*map(_shape_of, args), **{key: _shape_of(value) for key, value in kwargs.items()})
            return torch.full_like(like, torch.nan, device=spoilt[0].device)
        return func(*args, **kwargs)


def _shape_of(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


class _Output(NamedTuple):
    """What a module gave in one of its calls, and the shapes of what it was given."""

    outputs: tuple[Tensor | None, ...]
    as_tuple: bool
    given: dict[int | str, torch.Size]


def _keep(seen: list[_Output | None], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    dtype = next(module.parameters()).dtype  # of another one there would be no telling what to load it as
    fit = all(x is None or (isinstance(x, Tensor) and x.dtype == dtype and not x.isnan().any()) for x in outputs)
    given = {key: x.shape for key, x in (*enumerate(args), *kwargs.items()) if isinstance(x, Tensor)}
    seen.append(
        _Output(tuple(x if x is None else x.clone() for x in outputs), isinstance(output, tuple), given)
        if fit
        else None
    )


def _constant(one: list[_Output | None], two: list[_Output | None], elsewhere: list[_Output | None]) -> Constant | None:
    """What may stand in for a module, given its calls with one image, with two, and with two of another size; None if
    nothing may.
    """
    if (
        not one
        or not (len(one) == len(two) == len(elsewhere) and one[0] and two[0])
        or not (_all_equal(one) and _all_equal([*two, *elsewhere]))
    ):
        return None
    pairs = list(zip(one[0].outputs, two[0].outputs, strict=True))
    axes = [None if a is None or b is None else _growing(a.shape, b.shape) for a, b in pairs]
    counts = [_counted(a, b, c) for a, b, c in zip(one, two, elsewhere, strict=True)]
    needed = any(axis is not None for axis in axes)
    if (needed and (counts[0] is None or len(set(counts)) > 1)) or not all(
        _same(a, b, axis) for (a, b), axis in zip(pairs, axes, strict=True)
    ):
        return None
    return Constant(one[0].outputs, axes, counts[0] if needed else None, one[0].as_tuple)


def _by_step(several: list[Constant | None]) -> Constant | None:
    """What may stand in for a module at all timesteps, given what may at each of them; None if nothing may."""
    first, *others = several
    if first is None or not others:
        return first
    if any(other is None or _form(other) != _form(first) for other in others):
        return None
    steps = list(zip(*(constant.outputs for constant in several if constant is not None), strict=True))
    if all(_same_tensor(output[0], other) for output in steps for other in output):
        return first
    outputs = [None if output[0] is None else torch.stack(output) for output in steps]
    return Constant(outputs, first.axes, first.counted, first.as_tuple, by_step=True)


def _form(constant: Constant) -> tuple[Any, ...]:
    shapes = [None if output is None else output.shape for output in constant.outputs]
    return shapes, constant.axes, constant.counted, constant.as_tuple


def _same_tensor(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y if x is None or y is None else torch.equal(x, y)


def _all_equal(several: list[_Output | None]) -> bool:
    first = several[0]
    return first is not None and all(
        other is not None
        and (len(other.outputs), other.as_tuple) == (len(first.outputs), first.as_tuple)
        and all(_same_tensor(x, y) for x, y in zip(first.outputs, other.outputs, strict=True))
        for other in several
    )


def _growing(one: torch.Size, two: torch.Size) -> int | None:
    """The axis that doubles when there are two images, if it is the only one that changes."""
    changed = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    return changed[0] if len(changed) == 1 and two[changed[0]] == 2 * one[changed[0]] else None


def _counted(one: _Output | None, two: _Output | None, elsewhere: _Output | None) -> tuple[int | str, int, int] | None:
    """The first argument that tells how many images there are, whatever their size."""
    if one is None or two is None or elsewhere is None:
        return None
    found = (
        (key, _growing(shape, two.given[key]), shape)
        for key, shape in one.given.items()
        if two.given[key] == elsewhere.given[key]
    )
    return next(((key, axis, shape[axis]) for key, axis, shape in found if axis is not None), None)


def _same(one: Tensor | None, two: Tensor | None, axis: int | None) -> bool:
    """Whether two images have twice the output of one, but for the last digits, which differ with the number of rows
    that kernels are given.
    """
    if one is None or two is None:
        return one is two
    twice = one.repeat([2 if i == axis else 1 for i in range(one.ndim)])
    return twice.shape == two.shape and torch.allclose(twice, two, rtol=0, atol=0.05 * float(two.abs().max()))
