"""A backbone through ``torch.compile``: its image encoder and its denoiser, in place, one graph each.

In place means that ``Module.compile`` is used and nothing is wrapped: names of modules and of weights stay as they are.
What a call does around the two networks (padding, noise, the pyramid) costs little and stays as it is, so every keyword
of a call still works.

Networks are compiled whole and not block by block: PyTorch takes the graph of one block for all of its class, without a
look at which of them have hooks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffusion_backbones.families import Architecture
from diffusion_backbones.spec.declaration import Declaration

log = logging.getLogger(__name__)

FREEZE = "freeze"
"""Weights become constants of the graph, in the layout that the processor reads fastest. That is a graph for one batch
and one size.
"""
MAX = "max"
"""What a device is thought to do fastest, for one batch and one size: :data:`FREEZE` on a CPU; on a GPU kernels for
just these shapes, which PyTorch lays out with channels innermost only then, replayed as CUDA graphs.
"""
MODES = (FREEZE, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", MAX)
"""What ``create_model(compile=)`` takes beside True and False: :data:`FREEZE`, the modes of ``torch.compile``, and
:data:`MAX`.
"""
STATIC = (FREEZE, MAX)
"""Modes whose graphs are for one batch and one size."""
CUDA_GRAPHS = ("reduce-overhead", "max-autotune", MAX)
"""Modes that on a GPU replay recorded kernels, whose results the next replay overwrites."""
_SHAPES: WeakKeyDictionary[nn.Module, list[tuple[int, ...]]] = WeakKeyDictionary()
"""Image encoder or denoiser -> the shapes of the inputs that it has been compiled for."""


class Compiled(Protocol):
    """What is asked of a backbone here."""

    compiled: bool | str
    encoder: nn.Module
    denoiser: nn.Module

    @property
    def declaration(self) -> Declaration: ...

    @property
    def architecture(self) -> Architecture: ...


def check_compile(mode: bool | str, device: torch.device, trainable: bool | str = False) -> None:
    """Check that a backbone can be compiled here, before any weights are read.

    Raises:
        ValueError: No such mode, or weights that are trained would be frozen.
        FileNotFoundError: It is to be compiled for the CPU, and there is no C++ compiler.
    """
    if not (isinstance(mode, bool) or mode in MODES):
        raise ValueError(f"compile must be True, False or one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if resolve(mode, device) == FREEZE and trainable:
        here = "" if mode == FREEZE else " on a CPU"
        raise ValueError(
            f"compile={mode!r}{here} makes constants of the weights, and trainable={trainable!r} changes them; use "
            "compile=True"
        )
    if mode and device.type == "cpu":
        check_compiler()


def resolve(mode: bool | str, device: torch.device) -> bool | str:
    """What a mode stands for on a device."""
    return FREEZE if mode == MAX and device.type == "cpu" else mode


def check_compiler(instead: str = "leave compile out, which changes no feature") -> None:
    """Raise ``FileNotFoundError`` if PyTorch finds no C++ compiler; ``instead`` is what one may do without."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise FileNotFoundError(
            "compiling for the CPU needs a C++ compiler, and PyTorch found none. Install g++ or clang, or name one in "
            f"the environment variable CXX; or {instead}."
        ) from None


def compile_in_place(backbone: Compiled, mode: bool | str, backend: str = "inductor") -> None:
    """Have a backbone's networks compiled when they are first called; on ``meta``, where nothing is computed, never.

    Args:
        backbone: Changed in place.
        mode: True, or one of :data:`MODES`.
        backend: Of ``torch.compile``.

    Raises:
        ValueError: The network is not a single graph.
    """
    if not backbone.architecture.compilable:
        raise ValueError(
            f"{backbone.declaration.name} cannot be compiled: its network reads the lengths of texts on the host in "
            "every call, so it is not a single graph; leave compile out"
        )
    backbone.compiled = mode = resolve(mode, next(backbone.denoiser.parameters()).device)
    for part in (backbone.encoder, backbone.denoiser):
        _SHAPES.pop(part, None)
    for network in networks(backbone):
        if any(parameter.is_meta for parameter in network.parameters()):
            continue
        frozen, device = mode == FREEZE, next(network.parameters()).device
        options = None if frozen or backend != "inductor" else settings(mode, device)
        network.compile(fullgraph=True, backend=backend, dynamic=mode not in STATIC, options=options, **_own_limit())
        if frozen:
            network.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def settings(mode: bool | str, device: torch.device) -> dict[str, Any]:
    """What a mode means to inductor. On a CPU convolutions keep their layout: another one would copy their weights in
    every call.
    """
    name = {True: "default", MAX: "reduce-overhead"}.get(mode, str(mode))
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(name))
    return options | ({"layout_optimization": False} if device.type == "cpu" else {})


def _own_limit() -> dict[str, Any]:
    """Have PyTorch count the graphs of each network by themselves; older ones count those of all compiled modules of a
    process together.
    """
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def _refuse(module: nn.Module, *_: Any) -> None:
    raise ValueError(
        f"the weights of this {type(module).__name__} are constants of compiled code, and others would change "
        "nothing; create it without compile="
    )


def networks(backbone: Compiled) -> Iterator[nn.Module]:
    """What costs time."""
    if backbone.architecture.encoder:
        yield backbone.encoder.get_submodule("encoder")
    yield backbone.denoiser


def prepare_input(backbone: Compiled, x: Tensor) -> Tensor:
    """What goes into a network, (B, C, h, w), as a compiled graph wants it: of its own and in one layout, with batch,
    height and width marked as varying.

    A batch of one is a graph of its own: PyTorch takes a size of one for a constant.
    """
    if not backbone.compiled or torch.compiler.is_compiling():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    if backbone.compiled not in STATIC:
        torch._dynamo.maybe_mark_dynamic(x, (0, 2, 3))
    return x


def eager_context(backbone: Compiled) -> AbstractContextManager[Any]:
    """Within the ``with`` block, compiled networks run as they are written, and so see hooks that were installed after
    compiling.
    """
    return (
        torch.compiler.set_stance("force_eager")
        if backbone.compiled and not torch.compiler.is_compiling()
        else nullcontext()
    )


def compile_context(backbone: Compiled, network: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    """Around a network's run on an input (B, C, h, w): says what it is compiled anew for, and where its weights are to
    be frozen, asks for no gradient, as PyTorch demands.
    """
    if not backbone.compiled or torch.compiler.is_compiling():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(_told(backbone, network, x))
    if backbone.compiled == FREEZE:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._inductor.config.patch(freezing=True))
    return stack


@contextmanager
def _told(backbone: Compiled, network: nn.Module, x: Tensor) -> Iterator[None]:
    """Log the shape that a network is compiled anew for, and those that it had been compiled for."""
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    yield
    if graphs["unique_graphs"] == before:
        return
    shapes = _SHAPES.setdefault(network, [])
    if shapes:
        log.warning(
            "%s: its %s was compiled anew for an input of %s, beside %s; docs/compile.md says what takes another graph",
            backbone.declaration.name,
            type(network).__name__,
            tuple(x.shape),
            ", ".join(map(str, shapes)),
        )
    shapes.append(tuple(x.shape))


def own(backbone: Compiled, x: Tensor) -> Tensor:
    """What a network gave, in memory that no later run of it writes to."""
    return x.clone() if backbone.compiled in CUDA_GRAPHS else x
