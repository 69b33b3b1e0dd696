"""SDXL-Lightning: U-Nets distilled from Stable Diffusion XL to few steps, one for each number of them.

The one for a single step is left out: it predicts the image and not the noise, and the scheduler of Stable Diffusion
XL, which everything else is read from, says otherwise.
"""

from dataclasses import replace

from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.sdxl import SDXL
from diffusion_backbones.spec.checkpoint import HubFile, License
from diffusion_backbones.spec.registry import register_checkpoint

for steps in (2, 4, 8):
    register_checkpoint(
        replace(
            SDXL,
            name=f"sdxl_lightning_{steps}step",
            title=f"SDXL-Lightning, {steps} steps",
            configs="sdxl",
            denoiser=HubFile("ByteDance/SDXL-Lightning", f"sdxl_lightning_{steps}step_unet.safetensors"),
            license=License("openrail++", link="https://huggingface.co/ByteDance/SDXL-Lightning/blob/main/LICENSE.md"),
            paper=papers["lin2024lightning"],
        )
    )
