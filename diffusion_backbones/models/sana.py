"""Sana of NVIDIA. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

SANA_1600M_1024 = register_checkpoint(
    Checkpoint(
        name="sana_1600m_1024",
        title="Sana 1.6B 1024",
        hub_id="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        license=License(
            "other",
            name="nvidia-nscl-v2-custom",
            link="https://huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_diffusers/blob/main/LICENSE.txt",
            verified=False,
        ),
        paper=papers["xie2024sana"],
        input_size=1024,
        family="sana",
        unverified=(
            "Its scheduler config was not read; it is taken to be that of the 512 pixel twin.",
            "The text of its licence was not read; the name is what the page of the same weights in their original "
            "layout says.",
            "Gemma, its text encoder, has a licence of its own.",
        ),
    )
)
