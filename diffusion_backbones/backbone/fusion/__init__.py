"""Several backbones as one: the module, the members that are timm's, and its folder."""

from diffusion_backbones.backbone.fusion.module import FusedBackbone
from diffusion_backbones.backbone.fusion.timm_extractor import TimmExtractor

__all__ = ["FusedBackbone", "TimmExtractor"]
