"""Which activations of a diffusion network make good features: the procedure of GDF (https://arxiv.org/abs/2410.03558,
section 5), measured.

::

    prefix_cost   the cost of the network up to each activation
    measure       properties of the activations on a few dozen images: noise, position, locality, granularity ...
    rules         the filter: which are worth comparing, with the reason for every one that is not
    data, tasks   what they are compared on: masks, matched points, or known warps of the images themselves
    compare       the network runs once, then every activation is scored
    choose        a few that are good together, under a budget
    run           all of it in one folder, as ``diffusion-backbones select`` does

Each step stands alone; ``docs/selection.md`` explains them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_backbones.selection import choose, compare, data, measure, prefix_cost, rules, run, tasks
    from diffusion_backbones.selection.choose import Budget, Step
    from diffusion_backbones.selection.data import Data
    from diffusion_backbones.selection.measure import Measured
    from diffusion_backbones.selection.properties import Properties
    from diffusion_backbones.selection.result import Selection
    from diffusion_backbones.selection.rules import Rule
    from diffusion_backbones.selection.run import select
    from diffusion_backbones.selection.tasks import Keypoints, Match, Segmentation, Task

_LAZY = {  # the command line imports this room for the tables of the paper, which need no torch
    "choose": ("Budget", "Step"),
    "data": ("Data",),
    "measure": ("Measured",),
    "properties": ("Properties",),
    "result": ("Selection",),
    "rules": ("Rule",),
    "run": ("select",),
    "tasks": ("Keypoints", "Match", "Segmentation", "Task"),
}
_STEPS = ("choose", "compare", "data", "measure", "prefix_cost", "rules", "run", "tasks")
__all__ = [
    "Budget",
    "Data",
    "Keypoints",
    "Match",
    "Measured",
    "Properties",
    "Rule",
    "Segmentation",
    "Selection",
    "Step",
    "Task",
    "choose",
    "compare",
    "data",
    "measure",
    "prefix_cost",
    "rules",
    "run",
    "select",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _STEPS:
        return import_module(f"{__name__}.{name}")
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
