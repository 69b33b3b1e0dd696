"""From a name to a backbone, and from a backbone to a folder or file."""

from diffusion_backbones.factory.entry_points import architecture, build_described, create_model, model_entrypoint

__all__ = ["architecture", "build_described", "create_model", "model_entrypoint"]
