"""Registers every backbone in timm: ``timm.create_model("sd15_gdf", features_only=True)``.

This module is imported together with timm, whether timm is imported before this package or after it.
``timm.create_model`` returns the backbone itself, so everything that is built on timm's registry (``TimmBackbone`` of
transformers and OpenMMLab, smp's ``tu-`` encoders) reaches it too.
"""

from __future__ import annotations

import warnings
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models import is_model as is_timm_model

from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.fusion import Fusion, fusion_cfg
from diffusion_backbones.spec.registry import before_register, on_register

default_cfgs: dict[str, Any] = {}
__all__: list[str] = []
_ours: set[str] = set()
"""Architectures that were registered in timm from here."""


def _check(declaration: Declaration | Fusion) -> None:
    """Raise ``ValueError`` for a name that a model of timm has."""
    if _is_taken(declaration):
        raise ValueError(f"{declaration.architecture!r} is a model of timm; give another name=")


def _is_taken(declaration: Declaration | Fusion) -> bool:
    return is_timm_model(declaration.architecture) and declaration.architecture not in _ours


def _register(declaration: Declaration | Fusion) -> None:
    if _is_taken(declaration):  # it was registered before timm was imported
        warnings.warn(
            f"{declaration.name!r} is not in timm's registry, where the name is taken; register it under another name",
            stacklevel=2,
        )
        return
    _ours.add(declaration.architecture)

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        from diffusion_backbones.factory.entry_points import create_model  # torch and diffusers

        cfg = kwargs.pop("pretrained_cfg", None)  # timm hands on the tag of the name, or the place of a saved folder
        return create_model(_saved_in(cfg) or _full_name(declaration.architecture, cfg), pretrained, **kwargs)

    cfg = fusion_cfg(declaration) if isinstance(declaration, Fusion) else pretrained_cfg(declaration)
    default_cfgs.update(generate_default_cfgs({declaration.name: cfg}))
    if not declaration.tag:
        entry.__name__ = entry.__qualname__ = declaration.architecture
        entry.__module__ = __name__
        how = "a fusion" if isinstance(declaration, Fusion) else f"read by the recipe {declaration.recipe.name}"
        entry.__doc__ = f"{declaration.title}, {how}: a list of maps, fine to coarse."
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
before_register(_check)
