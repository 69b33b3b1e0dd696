"""U-Nets: in latents, in pixels, and DeepFloyd IF's, which attend to text and image at once."""

from diffusion_backbones.families.unet.latent import UNet

__all__ = ["UNet"]
