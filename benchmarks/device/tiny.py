"""Tiny networks of the real topologies under the real names, for a rehearsal without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from diffusion_backbones import families
from diffusion_backbones.factory import locate
from diffusion_backbones.families.tiny import shrink_vae
from diffusion_backbones.spec import configs, registry
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.declaration import Declaration

SIDE = 64
"""Side of the images in pixels."""


@contextmanager
def networks() -> Iterator[None]:
    """Within the ``with`` block, ``create_model`` builds every registered name with tiny widths."""
    with ExitStack() as patches:
        for module in (families, locate):
            patches.enter_context(mock.patch.object(module, "package_configs", _configs))
        patches.enter_context(mock.patch.object(locate, "get_declaration", _declaration))
        yield


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    shrunk = copy.deepcopy(configs.package_configs(checkpoint))
    shrink_vae(shrunk)
    families.FAMILIES[checkpoint.family].tiny(shrunk)
    return shrunk


def _declaration(name: str) -> Declaration:
    declaration = registry.get_declaration(name)
    narrow = tuple(channel % 10 for channel in declaration.recipe.discard)
    return replace(declaration, recipe=declaration.recipe.override(discard=narrow))
