"""Chroma of Lodestone Rock. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

CHROMA1_HD = register_checkpoint(
    Checkpoint(
        name="chroma1_hd",
        title="Chroma1-HD",
        hub_id="lodestones/Chroma1-HD",
        license=License("apache-2.0"),
        paper=papers["lodestone2025chroma"],
        input_size=1024,
        family="chroma",
        encoder_float16=False,
        unverified=(
            "Its transformer's config was read in a copy of the weights; it is that of diffusers' class by default.",
            "Its VAE's and its text encoder's config were not read; they are taken to be those of FLUX.1 [schnell].",
            "Its scheduler's config was not read; that it is one of a rectified flow is what its page says.",
            "diffusers' pipeline adds 1 to the scores of what is not padding and masks nothing; here padding is "
            "masked, as its author describes the training.",
        ),
    )
)
