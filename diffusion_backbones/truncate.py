"""Shorten a network to what a recipe reaches.

A family describes, per module class, the order in which children run and what may stand in for a child that no longer runs
(:data:`Steps`). :func:`truncate` walks down to the last requested module, drops everything behind it, and leaves a network
whose stock ``forward`` still runs. What it returns after the last activation is meaningless and is thrown away.

Stand-ins hold no parameters, so the weights of what was dropped are never read and nothing unreachable is left to train.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Bypass(nn.Module):
    """Returns its first argument, with ``as_tuple`` inside a tuple."""

    def __init__(self, as_tuple: bool = False):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (x,) if self.as_tuple else x


class StandIn(nn.Module):
    """Returns its first argument's first channel, repeated to ``channels`` along ``dim``: the right shape at no cost."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.out_features, self.dim = channels, dim         # named as in nn.Linear, so that a network can be cut twice

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.out_features
        return x.narrow(self.dim, 0, 1).expand(shape)


class AttentionTap(nn.Module):
    """What is left of an attention layer of which only projections are read: runs those and returns its input."""

    def __init__(self, attention: nn.Module, names: Collection[str]):
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            if name in names:
                self.add_module(name, getattr(attention, name))
        for name in ("heads", "scale", "upcast_attention", "upcast_softmax", "norm_q", "norm_k"):     # what a map is computed with
            setattr(self, name, getattr(attention, name))

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        source = x if encoder_hidden_states is None else encoder_hidden_states
        for name in ("to_q", "to_k", "to_v"):
            if hasattr(self, name):
                getattr(self, name)(x if name == "to_q" else source)
        return x


STAND_INS = (Bypass, StandIn)


class Step(NamedTuple):
    """One child in execution order.

    Args:
        name: Path of the child relative to its parent.
        drop: What replaces it once nothing behind it is needed: a module, None for an optional child that ``forward``
            tests for, or :data:`REMOVE` to shorten the ``ModuleList`` that holds it.
    """

    name: str
    drop: nn.Module | object | None


REMOVE = object()
Steps = Mapping[str, Callable[[Any], list[Step]]]
"""Class name -> function from a module of that class to its steps. Classes that are not listed are kept whole."""


def truncate(module: nn.Module, paths: Collection[str], steps: Steps) -> nn.Module:
    """Cut ``module`` behind the last of ``paths``, in place, and return it (or what replaces it).

    Args:
        module: A network on any device, ``meta`` included.
        paths: Paths of the modules whose outputs are needed, relative to ``module``. ``""`` keeps it whole.
        steps: Execution order and stand-ins per class.
    """
    kind = type(module).__name__
    if "" in paths:
        return module
    if kind == "Attention" and {p.split(".")[0] for p in paths} <= {"to_q", "to_k", "to_v"}:
        return AttentionTap(module, set(paths))
    if kind not in steps:
        return module
    order = steps[kind](module)
    last = max((i for i, step in enumerate(order) for p in paths if _inside(p, step.name)), default=None)
    if last is None:                        # something that has no place in the order, so keep everything
        return module
    name = order[last].name
    inside = [p[len(name) :].lstrip(".") for p in paths if _inside(p, name)]
    module.set_submodule(name, truncate(module.get_submodule(name), inside, steps))
    for step in reversed(order[last + 1 :]):
        _drop(module, step)
    return module


def _inside(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")


def _drop(module: nn.Module, step: Step) -> None:
    parent, _, child = step.name.rpartition(".")
    owner = module.get_submodule(parent)
    if step.drop is REMOVE:
        assert isinstance(owner, nn.ModuleList)
        del owner[int(child)]
    elif isinstance(owner, nn.ModuleList):
        owner[int(child)] = step.drop       # type: ignore[assignment]
    else:
        setattr(owner, child, step.drop)


def has(network: nn.Module, path: str) -> bool:
    """Whether a (truncated) network still computes the output of the module at ``path``."""
    try:
        module = network.get_submodule(path)
    except AttributeError:
        return False
    return not isinstance(module, (*STAND_INS, AttentionTap))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, on any device."""
    return sum(p.numel() for p in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of parameters and persistent buffers as stored in ``module``'s dtype, on any device."""
    return sum(t.numel() * torch.empty((), dtype=t.dtype).element_size() for t in module.state_dict().values())
