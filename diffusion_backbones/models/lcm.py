"""Latent consistency models: networks distilled to few steps, which take the scale of guidance as an input."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

LCM_DREAMSHAPER = register_checkpoint(
    Checkpoint(
        name="lcm_dreamshaper_v7",
        title="LCM Dreamshaper v7",
        hub_id="SimianLuo/LCM_Dreamshaper_v7",
        license=License("mit", link="https://huggingface.co/SimianLuo/LCM_Dreamshaper_v7"),
        paper=papers["luo2023lcm"],
        input_size=768,
        unverified=(
            "The end of its U-Net config, and the configs of its image encoder and text encoder, were not read; they "
            "are taken to be those of Stable Diffusion 1.5.",
            "Whether its image encoder and text encoder are there as .safetensors, which alone are read, is open.",
            "The weights are published under MIT; whether the licence of the model that they were distilled "
            "from binds them too is not settled.",
        ),
    )
)
