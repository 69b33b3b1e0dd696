"""Entry points for ``torch.hub``: every registered backbone, with its weights unless ``pretrained=False``."""

from collections.abc import Callable as _Callable
from importlib.util import find_spec as _find_spec
from typing import Any as _Any

dependencies = [
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "timm",
    "safetensors",
    "huggingface_hub",
    "yaml",
    "msgspec",
    "jinja2",
]


def _entry(name: str) -> _Callable[..., _Any]:
    import diffusion_backbones as db
    from diffusion_backbones.reports import backbone_card, fusion_card

    def entry(pretrained: bool = True, **kwargs: _Any) -> _Any:
        return db.create_model(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    fused = name in db.list_fusions()
    help_of = (
        fusion_card.entry_help(db.get_fusion(name)) if fused else backbone_card.entry_help(db.get_declaration(name))
    )
    entry.__doc__ = help_of
    return entry


def _entries() -> dict[str, _Callable[..., _Any]]:
    import diffusion_backbones as db

    return {name: _entry(name) for name in (*db.list_models(), *db.list_fusions())}


if all(map(_find_spec, dependencies)):  # otherwise torch.hub says which of them are missing
    globals().update(_entries())
