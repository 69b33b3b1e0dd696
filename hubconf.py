"""Entry points for ``torch.hub``: every registered backbone, with its weights unless ``pretrained=False``."""

from importlib.util import find_spec as _find_spec

dependencies = ["torch", "torchvision", "diffusers", "transformers", "timm", "safetensors", "huggingface_hub", "yaml", "wrapt"]


def _entry(name):
    import diffusion_backbones as db
    from diffusion_backbones.cards import entry_help

    def entry(pretrained=True, **kwargs):
        return db.create_model(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = entry_help(db.get_declaration(name))
    return entry


def _names():
    import diffusion_backbones as db

    return db.list_models()


if all(map(_find_spec, dependencies)):          # otherwise torch.hub says which of them are missing
    globals().update({name: _entry(name) for name in _names()})
