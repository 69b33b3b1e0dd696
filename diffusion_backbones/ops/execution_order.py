"""In which order the parts of a network run, and what may stand in for a part that is cut off, as plain data.

A family declares an :class:`ExecutionOrder`, and :mod:`diffusion_backbones.ops.truncation` reads it. Nothing here
needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Drop(NamedTuple):
    """What becomes of a child once nothing behind it is needed.

    Args:
        by: ``"remove"`` shortens the ``ModuleList`` that holds it, ``"none"`` sets an optional child to None, which
            ``forward`` tests for; otherwise the name of a stand-in in :mod:`diffusion_backbones.ops.truncation`.
        arguments: Of the stand-in.
    """

    by: str
    arguments: tuple[Any, ...] = ()


REMOVE, NONE = Drop("remove"), Drop("none")
BYPASS, BYPASS_AS_TUPLE, PAIR = Drop("Bypass"), Drop("Bypass", (True,)), Drop("Pair")


def stand_in(channels: int, dim: int) -> Drop:
    """By something of the right shape at no cost, with ``channels`` along ``dim``."""
    return Drop("StandIn", (channels, dim))


def one_token(channels: int, dim: int) -> Drop:
    """The same, of the first token alone: an unpatchify for squares then takes any grid."""
    return Drop("OneToken", (channels, dim))


def first_token(channels: int) -> Drop:
    """The same of a text, (B, tokens, C) -> (B, channels), for what pools it."""
    return Drop("FirstToken", (channels,))


class Step(NamedTuple):
    """One child in execution order.

    Args:
        name: Path of the child relative to its parent.
        drop: What becomes of it once nothing behind it is needed.
    """

    name: str
    drop: Drop


Steps = Callable[[Any], list[Step]]
"""From a module to its children in execution order."""


@dataclass(frozen=True)
class ExecutionOrder:
    """How the networks of a family may be cut.

    Args:
        steps: Class name -> the steps of a module of that class. Classes that are not listed are kept whole.
        attention: Classes of attention layers of which projections alone may be kept.
        modulated: Classes of blocks of which the modulation alone may be kept.
        two_streams: Classes of blocks that also compute an output for the text.
        text_half: What of such a block only the blocks behind it need, if an image's output is read there.
    """

    steps: Mapping[str, Steps]
    attention: tuple[str, ...] = ("Attention",)
    modulated: tuple[str, ...] = ()
    two_streams: tuple[str, ...] = ()
    text_half: tuple[str, ...] = ("norm2_context", "ff_context", "attn.to_add_out")


def numbered(network: Any, *lists: str) -> list[Step]:
    """The children of module lists, one after another, each of which may be removed from the end."""
    return [Step(f"{name}.{i}", REMOVE) for name in lists for i in range(len(getattr(network, name)))]


def in_order(first: str, *rest: str) -> Steps:
    """A child that may be None, and those behind it, each of which may be passed by."""
    return lambda _: [Step(first, NONE), *(Step(name, BYPASS) for name in rest)]
