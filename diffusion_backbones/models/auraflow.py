"""AuraFlow of fal. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

AURAFLOW_03 = register_checkpoint(
    Checkpoint(
        name="auraflow_03",
        title="AuraFlow 0.3",
        hub_id="fal/AuraFlow-v0.3",
        revision="b1e504e6d0462bb3d30c3f0aa8aa05b64dd6d3c2",
        license=License("apache-2.0"),
        paper=None,
        input_size=1024,
        family="auraflow",
        encoder_float16=False,
        unverified=(
            "Its transformer's config was not read; it is taken to be that of 0.1 with more positions, 9216, which "
            "the 1536 pixels of its page need.",
            "Its VAE config was not read; it is taken to be SDXL's.",
        ),
    )
)
