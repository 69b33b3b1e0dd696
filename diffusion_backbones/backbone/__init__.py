"""The backbone: the module, the pipeline of one call, the call's arguments, timm's methods."""

from diffusion_backbones.backbone.module import Conditioning, DiffusionBackbone

__all__ = ["Conditioning", "DiffusionBackbone"]
