"""Record activations while a network runs, inside one call and nowhere else.

Hooks are installed once and stay: a hook that is added per call breaks ``torch.compile`` and ``torch.export``, and is
never seen by a network that was compiled before. They are bound methods, so that copies and pickles of a network record
into their own recorder, and they write to a thread-local store that exists only while a call runs, so that threads do
not mix and a block that is run again by gradient checkpointing leaves nothing behind.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.ops.truncation import has
from diffusion_backbones.spec.activations import MAP, OUT, Port, Site

_INSTALL = threading.Lock()


class _Store(threading.local):
    """What the call that runs in this thread wants to record; None outside calls."""

    acts: dict[str, Tensor] | None = None
    wanted: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[type[_Store], tuple[()]]:
        return _Store, ()  # copies and pickles start empty


class Recorder:
    """Records what sites of one network produce.

    Args:
        sites: The activations that calls will ask for; :meth:`add_hooks` adds more later.
    """

    def __init__(self, network: nn.Module, sites: Iterable[Site]):
        self._watched: set[str] = set()
        self._store = _Store()
        self.add_hooks(network, sites)

    def add_hooks(self, network: nn.Module, sites: Iterable[Site]) -> None:
        """Install the hooks for ``sites`` that are not there yet."""
        with _INSTALL:
            for site in sites:
                for key, path, port in _taps(site):
                    if key not in self._watched:
                        network.get_submodule(path).register_forward_hook(functools.partial(self._record, key, port))
                        self._watched.add(key)

    def _record(self, key: str, port: Port | str, _module: nn.Module, args: Any, output: Any) -> None:
        store = self._store
        if store.acts is not None and key in store.wanted:
            port = Port.parse(port) if isinstance(port, str) else port  # pickles of version 0.1 hold text
            if port.side == "in":
                store.acts[key] = args[0]
            else:
                store.acts[key] = output if isinstance(output, Tensor) else output[port.index or 0]

    @contextmanager
    def recording(self, sites: Iterable[Site], acts: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Within the ``with`` block, record what this thread's calls of the network produce at ``sites``, in a new
        dictionary or in ``acts``.
        """
        acts = {} if acts is None else acts
        self._store.acts, self._store.wanted = acts, frozenset(key for site in sites for key, _, _ in _taps(site))
        try:
            yield acts
        finally:
            self._store.acts = None


class StreamingStore(dict[str, Tensor]):
    """Gives every activation away as soon as it was recorded, and keeps none.

    Args:
        sites: What is recorded.
        visit: Called with a site and what was recorded for it, while the network runs.
    """

    def __init__(self, sites: Iterable[Site], visit: Callable[[Site, tuple[Tensor, ...]], None]):
        super().__init__()
        self._visit, self._waiting = visit, {site: [key for key, _, _ in _taps(site)] for site in sites}

    def __setitem__(self, key: str, act: Tensor) -> None:
        super().__setitem__(key, act)
        for site in [site for site, keys in self._waiting.items() if key in keys and all(k in self for k in keys)]:
            self._visit(site, tuple(self[k] for k in self._waiting.pop(site)))
        for k in [k for k in self if not any(k in keys for keys in self._waiting.values())]:
            del self[k]

    def close(self) -> None:
        """Raise ``RuntimeError``, see :func:`collect`, if the network ran and something was not recorded."""
        for site in self._waiting:
            collect(self, site)


def collect(acts: dict[str, Tensor], site: Site) -> tuple[Tensor, ...]:
    """What was recorded for a site: one tensor, or for an attention map what its taps gave.

    Raises:
        RuntimeError: Nothing was recorded: the network was compiled before its hooks were installed, or its projections
            were fused.
    """
    try:
        return tuple(acts[key] for key, _, _ in _taps(site))
    except KeyError:
        raise RuntimeError(
            f"{site.id} was not recorded although the network ran: it was compiled before this activation was first "
            "asked for, or its query, key and "
            "value projections were fused. Ask for it once before compiling, or name it in the recipe; do not fuse."
        ) from None


def available(network: nn.Module, site: Site) -> bool:
    """Whether a (truncated) network still computes an activation."""
    return all(has(network, path) for path in site.modules)


def _taps(site: Site) -> list[tuple[str, str, Port]]:
    """(key, module path, port) of each tensor that must be recorded for a site."""
    if site.parts:
        return [tap for part in site.parts for tap in _taps(part)]
    port = OUT if site.port == MAP else site.port
    return [(f"{path}:{port}", path, port) for path in site.modules]


class _Tie(torch.autograd.Function):
    """Passes an activation on, and in the backward pass sends zeros to what the network returned."""

    @staticmethod
    def forward(ctx: Any, act: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return act.view_as(act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def keep_output_in_graph(act: Tensor, output: Tensor) -> Tensor:
    """The same activation, in a graph that also holds what the network returned.

    FSDP gathers a block's parameters for the backward pass when a gradient reaches the block's output. Nothing but
    zeros ever does for the block that holds the last activation, so without this its parameters would not be there.
    """
    return _Tie.apply(act, output) if output.requires_grad and act.requires_grad else act
