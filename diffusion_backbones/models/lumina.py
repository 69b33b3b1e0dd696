"""Lumina-Image 2 of Alpha-VLLM. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

LUMINA_IMAGE_2 = register_checkpoint(
    Checkpoint(
        name="lumina_image_2",
        title="Lumina-Image 2.0",
        hub_id="Alpha-VLLM/Lumina-Image-2.0",
        license=License("apache-2.0"),
        paper=papers["qin2025lumina"],
        input_size=1024,
        family="lumina",
        encoder_float16=False,
        unverified=(
            "Its VAE config was not read; by its size it is that of FLUX.1 [dev].",
            "Gemma, its text encoder, has a licence of its own.",
        ),
    )
)
