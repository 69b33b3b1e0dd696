"""Registers every backbone in timm: ``timm.create_model("sd15_gdf", features_only=True)``.

This module is imported together with timm, whether timm is imported before this package or after it.
``timm.create_model`` returns the backbone itself, so everything that is built on timm's registry (``TimmBackbone`` of
transformers and OpenMMLab, smp's ``tu-`` encoders) reaches it too.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.registry import on_register

default_cfgs: dict[str, Any] = {}
__all__: list[str] = []


def _register(declaration: Declaration) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        from diffusion_backbones.factory.entry_points import create_model  # torch and diffusers

        cfg = kwargs.get("pretrained_cfg")
        return create_model(_saved_in(cfg) or _full_name(declaration.architecture, cfg), pretrained, **kwargs)

    default_cfgs.update(generate_default_cfgs({declaration.name: pretrained_cfg(declaration)}))
    if not declaration.tag:
        entry.__name__ = entry.__qualname__ = declaration.architecture
        entry.__module__ = __name__
        entry.__doc__ = (
            f"{declaration.checkpoint.title}, read by the recipe {declaration.recipe.name}: a list of "
            "maps, fine to coarse."
        )
        register_model(entry)


def _full_name(architecture: str, cfg: Any) -> str:
    """The name with its tag, which timm splits off and passes as ``pretrained_cfg``, alone or in a configuration."""
    tag = cfg if isinstance(cfg, str) else cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)
    return f"{architecture}.{tag}" if tag else architecture


def _saved_in(cfg: Any) -> str | None:
    """The place of a saved backbone, or None.

    For ``timm.create_model("local-dir:folder")`` timm passes on the architecture that the folder names, and the place
    in ``pretrained_cfg``.
    """
    if not isinstance(cfg, dict) or cfg.get("source") not in ("local-dir", "hf-hub"):
        return None
    return f"{cfg['source']}:{cfg['file' if cfg['source'] == 'local-dir' else 'hf_hub_id']}"


on_register(_register)
