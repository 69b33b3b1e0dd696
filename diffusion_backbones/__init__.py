"""timm for diffusion features: named, frozen diffusion backbones that return feature pyramids."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_backbones import models as _declarations  # noqa: F401  (registers everything)
from diffusion_backbones._moved import install
from diffusion_backbones._version import __version__
from diffusion_backbones.integrations.import_hook import when_imported
from diffusion_backbones.ops.large_libraries import uncollected
from diffusion_backbones.spec.checkpoint import Checkpoint, HubFile, License, Paper
from diffusion_backbones.spec.fusion import Fusion, Member, TimmModel
from diffusion_backbones.spec.recipe import Level, Recipe
from diffusion_backbones.spec.registry import (
    before_register,
    get_checkpoint,
    get_declaration,
    get_fusion,
    get_pretrained_cfg,
    is_model,
    list_checkpoints,
    list_fusions,
    list_models,
    list_pretrained,
    register_checkpoint,
    register_fusion,
    register_model,
)
from diffusion_backbones.surgery.registration import check_declaration

if TYPE_CHECKING:
    from diffusion_backbones.backbone.fusion import FusedBackbone
    from diffusion_backbones.backbone.module import DiffusionBackbone
    from diffusion_backbones.factory.entry_points import create_model, model_entrypoint
    from diffusion_backbones.factory.export import export
    from diffusion_backbones.factory.fuse import fuse


__all__ = [
    "Checkpoint",
    "DiffusionBackbone",
    "FusedBackbone",
    "Fusion",
    "HubFile",
    "Level",
    "License",
    "Member",
    "Paper",
    "Recipe",
    "TimmModel",
    "__version__",
    "create_model",
    "export",
    "fuse",
    "get_checkpoint",
    "get_declaration",
    "get_fusion",
    "get_pretrained_cfg",
    "is_model",
    "list_checkpoints",
    "list_fusions",
    "list_models",
    "list_pretrained",
    "model_entrypoint",
    "register_checkpoint",
    "register_fusion",
    "register_model",
]

_LAZY = {  # what needs torch and diffusers
    "DiffusionBackbone": "backbone",
    "FusedBackbone": "backbone.fusion",
    "create_model": "factory",
    "export": "factory.export",
    "fuse": "factory.fuse",
    "model_entrypoint": "factory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with uncollected():
            return getattr(import_module(f"diffusion_backbones.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


install()


before_register(check_declaration)  # of what users register; what travels in the package is checked by its tests
when_imported("timm", partial(import_module, "diffusion_backbones.integrations.timm"))
