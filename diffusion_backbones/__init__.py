"""timm for diffusion features: named, frozen diffusion backbones that return feature pyramids."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from diffusion_backbones import models as _declarations  # noqa: F401  (registers everything)
from diffusion_backbones.recipe import Checkpoint, HubFile, Level, License, Paper, Recipe
from diffusion_backbones.registry import (
    get_checkpoint,
    get_declaration,
    get_pretrained_cfg,
    is_model,
    list_checkpoints,
    list_models,
    list_pretrained,
    register_checkpoint,
    register_model,
)
from diffusion_backbones.version import __version__

if TYPE_CHECKING:
    from diffusion_backbones.backbone import DiffusionBackbone
    from diffusion_backbones.exporting import export
    from diffusion_backbones.factory import create_model, model_entrypoint



__all__ = [
    "Checkpoint",
    "DiffusionBackbone",
    "HubFile",
    "Level",
    "License",
    "Paper",
    "Recipe",
    "__version__",
    "create_model",
    "export",
    "get_checkpoint",
    "get_declaration",
    "get_pretrained_cfg",
    "is_model",
    "list_checkpoints",
    "list_models",
    "list_pretrained",
    "model_entrypoint",
    "register_checkpoint",
    "register_model",
]

_LAZY = {"create_model": "factory", "model_entrypoint": "factory", "export": "exporting", "DiffusionBackbone": "backbone"}     # what needs torch and diffusers


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"diffusion_backbones.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


@wrapt.when_imported("timm")
def _register_in_timm(timm: Any) -> None:
    import_module("diffusion_backbones.integrations.timm")
