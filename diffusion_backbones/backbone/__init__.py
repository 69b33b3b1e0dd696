"""The backbone: the module, the pipeline of one call, the call's arguments, timm's methods."""

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.backbone.state import Conditioning

__all__ = ["Conditioning", "DiffusionBackbone"]
