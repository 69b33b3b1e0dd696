"""A backbone through ``torch.compile``: its image encoder and its denoiser, in place, one graph each.

In place means that ``Module.compile`` is used and nothing is wrapped: names of modules and of weights stay as they are.
What a call does around the two networks (padding, noise, the pyramid) costs little and stays as it is, so every keyword
of a call still works.

Networks are compiled whole and not block by block: PyTorch takes the graph of one block for all of its class, without a
look at which of them have hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion_backbones.families import Architecture
from diffusion_backbones.spec.declaration import Declaration

FREEZE = "freeze"
"""Weights become constants of the graph, in the layout that the processor reads fastest. That is a graph for one batch
and one size.
"""
MODES = (FREEZE, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``create_model(compile=)`` takes beside True and False: :data:`FREEZE`, and the modes of ``torch.compile``."""
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that on a GPU replay recorded kernels, whose results the next replay overwrites."""


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
    if mode == FREEZE and trainable:
        raise ValueError(
            f"compile={FREEZE!r} makes constants of the weights, and trainable={trainable!r} changes them; use "
            "compile=True"
        )
    if mode and device.type == "cpu":
        check_compiler()


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
    backbone.compiled = mode
    for network in networks(backbone):
        if any(parameter.is_meta for parameter in network.parameters()):
            continue
        if mode == FREEZE:
            network.compile(fullgraph=True, backend=backend, dynamic=False, **_own_limit())
            network.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
        else:
            options = settings(mode, next(network.parameters()).device) if backend == "inductor" else None
            network.compile(fullgraph=True, backend=backend, dynamic=True, options=options, **_own_limit())


def settings(mode: bool | str, device: torch.device) -> dict[str, Any]:
    """What a mode means to inductor. On a CPU convolutions keep their layout: another one would copy their weights in
    every call.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options("default" if mode is True else str(mode)))
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
    if backbone.compiled != FREEZE:
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


def compile_context(backbone: Compiled) -> AbstractContextManager[Any]:
    """Around a network's run: where its weights are to be frozen, PyTorch demands that no gradient is asked for."""
    if backbone.compiled != FREEZE or torch.compiler.is_compiling():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch._inductor.config.patch(freezing=True))
    return stack
