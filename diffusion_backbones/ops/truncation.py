"""Shorten a network to what a recipe reaches.

A family describes, per module class, the order in which children run and what may stand in for a child that no longer
runs (:mod:`diffusion_backbones.ops.execution_order`). :func:`truncate` walks down to the last requested module, drops
everything behind it, and leaves a network whose stock ``forward`` still runs. What it returns after the last activation
is meaningless and is thrown away.

Stand-ins hold no parameters, so the weights of what was dropped are never read and nothing unreachable is left to
train.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.ops.execution_order import ExecutionOrder, Step


class Bypass(nn.Module):
    """Returns its first argument, which may be named ``hidden_states``, with ``as_tuple`` inside a tuple."""

    def __init__(self, as_tuple: bool = False):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Tensor | None = None, *args: Any, hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        out = hidden_states if x is None else x
        return (out,) if self.as_tuple else out


class StandIn(nn.Module):
    """Returns its first argument's first channel, repeated to ``channels`` along ``dim``: the right shape for free."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.out_features, self.dim = channels, dim  # named as in nn.Linear, so that a network can be cut twice

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.out_features
        return x.narrow(self.dim, 0, 1).expand(shape)


class OneToken(StandIn):
    """The same, of the first token alone: an unpatchify for squares then takes any grid."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x[:, :1])


class FirstToken(StandIn):
    """The same of a text, (B, tokens, C) -> (B, channels), for what pools it."""

    def __init__(self, channels: int):
        super().__init__(channels, dim=1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x[:, 0])


class Pair(nn.Module):
    """Stands in for an attention layer of two streams: returns both."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return hidden_states, encoder_hidden_states


class AttentionTap(nn.Module):
    """What is left of an attention layer of which only projections are read: runs those and returns its inputs."""

    IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    NORMS = {"to_q": "norm_q", "to_k": "norm_k", "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k"}

    def __init__(self, attention: nn.Module, names: Collection[str]):
        super().__init__()
        self.joint = getattr(attention, "added_kv_proj_dim", None) is not None
        for name in (*self.IMAGE, *self.TEXT):
            if name in names:
                self.add_module(name, getattr(attention, name))
        self.heads = getattr(attention, "heads", None)  # what a map is computed with
        maps = {"to_q", "to_k"} <= set(names)
        for projection, norm in self.NORMS.items():
            setattr(self, norm, getattr(attention, norm, None) if maps and projection in names else None)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        for name in self.IMAGE:
            if hasattr(self, name):
                getattr(self, name)(hidden_states if name == "to_q" or self.joint else text)
        for name in self.TEXT:
            if hasattr(self, name):
                getattr(self, name)(text)
        return (hidden_states, encoder_hidden_states) if self.joint else hidden_states


class ModulationTap(nn.Module):
    """What is left of a block whose modulation alone is read: computes that and returns the block's inputs."""

    def __init__(self, block: nn.Module, norm: str):
        super().__init__()
        self.add_module(norm, getattr(block, norm))
        self.norm_name = norm
        self.names = [name for name in inspect.signature(block.forward).parameters][:3]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        getattr(self, self.norm_name)(given["hidden_states"], emb=given["temb"])
        if "encoder_hidden_states" not in given:
            return given["hidden_states"]
        return given["encoder_hidden_states"], given["hidden_states"]


STAND_INS = {"Bypass": Bypass, "StandIn": StandIn, "OneToken": OneToken, "FirstToken": FirstToken, "Pair": Pair}
"""What may stand in for a child, by the names that :class:`~diffusion_backbones.ops.execution_order.Drop` uses."""


def truncate(module: nn.Module, paths: Collection[str], order: ExecutionOrder) -> nn.Module:
    """Cut ``module`` behind the last of ``paths``, in place, and return it (or what replaces it).

    Args:
        module: A network on any device, ``meta`` included.
        paths: Paths of the modules whose outputs are needed, relative to ``module``. ``""`` keeps it whole.
        order: Execution order and stand-ins per class.
    """
    kind = type(module).__name__
    if "" in paths:
        return _without_text(module, order)
    if kind in order.attention and _reads_projections_alone(module, paths):
        return AttentionTap(module, set(paths))
    if kind in order.modulated and {p.partition(".")[2] for p in paths} == {"linear"}:
        return ModulationTap(module, next(iter(paths)).split(".")[0])
    if kind not in order.steps:
        return module
    steps = order.steps[kind](module)
    last = max((i for i, step in enumerate(steps) for p in paths if _inside(p, step.name)), default=None)
    if last is None:  # something that has no place in the order, so keep everything
        return module
    name = steps[last].name
    inside = [p[len(name) :].lstrip(".") for p in paths if _inside(p, name)]
    if last and _reads_image_alone(module.get_submodule(name), inside, order):
        before = steps[last - 1].name
        if not any(_inside(p, f"{before}.{half}") for p in paths for half in order.text_half):
            _without_text(module.get_submodule(before), order)
    module.set_submodule(name, truncate(module.get_submodule(name), inside, order))
    for step in reversed(steps[last + 1 :]):
        _drop(module, step)
    return module


def _reads_projections_alone(attention: nn.Module, paths: Collection[str]) -> bool:
    read = {path.partition(".")[0] for path in paths}
    return getattr(attention, "group_norm", None) is None and read <= {*AttentionTap.IMAGE, *AttentionTap.TEXT}


def _reads_image_alone(block: nn.Module, paths: Collection[str], order: ExecutionOrder) -> bool:
    """Whether all that is read of a block with two streams is projections of the image, which no text goes into."""
    return type(block).__name__ in order.two_streams and set(paths) <= {f"attn.{name}" for name in AttentionTap.IMAGE}


def _without_text(block: nn.Module, order: ExecutionOrder) -> nn.Module:
    """Drop what a block with two streams computes for the text of the blocks behind it, in place; others stay whole."""
    for path in order.text_half if type(block).__name__ in order.two_streams else ():
        owner, _, child = path.rpartition(".")
        if getattr(block.get_submodule(owner), child, None) is not None:
            setattr(block.get_submodule(owner), child, Bypass())
    return block


def _inside(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")


def _drop(module: nn.Module, step: Step) -> None:
    parent, _, child = step.name.rpartition(".")
    owner = module.get_submodule(parent)
    if step.drop.by == "remove":
        assert isinstance(owner, nn.ModuleList)
        del owner[int(child)]
        return
    instead = None if step.drop.by == "none" else STAND_INS[step.drop.by](*step.drop.arguments)
    if isinstance(owner, nn.ModuleList):
        owner[int(child)] = instead  # type: ignore[assignment]
    else:
        setattr(owner, child, instead)


def has(network: nn.Module, path: str) -> bool:
    """Whether a (truncated) network still computes the output of the module at ``path``."""
    try:
        module = network.get_submodule(path)
    except AttributeError:
        return False
    return not isinstance(module, (Bypass, Pair, StandIn, AttentionTap, ModulationTap))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, on any device."""
    return sum(p.numel() for p in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of parameters and persistent buffers as stored in ``module``'s dtype, on any device."""
    return sum(t.numel() * torch.empty((), dtype=t.dtype).element_size() for t in module.state_dict().values())
