"""Segmind's SSD-1B, a distilled Stable Diffusion XL with fewer transformer blocks."""

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAESDXL
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

SSD_1B = register_checkpoint(
    Checkpoint(
        name="ssd_1b",
        title="Segmind SSD-1B",
        hub_id="segmind/SSD-1B",
        revision="60987f37e94cd59c36b1cba832b9f97b57395a10",  # the commit that public projects pin for this repository
        license=License(
            "apache-2.0", link="https://github.com/segmind/SSD-1B/blob/e7fd132c1759674f822d67b9b047b85762094213/LICENSE"
        ),
        paper=papers["gupta2024progressive"],
        input_size=1024,
        tiny_encoder=TAESDXL,
        encoder_float16=False,
        unverified=(
            "Its U-Net config is put together from public code that agrees with the sizes of the weight files; the "
            "file itself was not read.",
            "Its VAE, text encoder and scheduler configs are taken to be SDXL's.",
        ),
    )
)

register_model(
    SSD_1B,
    Recipe(
        name="diffcut",
        levels=("down-level2-repeat1-vit-block3-self-out",),
        timestep=50,
        seed=42,
        input_size=1024,
        paper=papers["couairon2024diffcut"],
        source="PaulCouairon/DiffCut at aa16df4, tools/ldm.py",
        notes=(
            "The level is the output of the encoder's last self-attention; its id is this package's extension of "
            "GDF's grammar.",
            "DiffCut draws a noise of the latent's size from seed 42; here it is cropped from a canvas of that seed, "
            "so its values differ.",
            notes.aspect_ratio(
                "DiffCut resizes every image to 1024 x 1024 and runs the U-Net in float16", size_conditioning=True
            ),
            "The recursive normalized cut that turns these features into segments is not part of this package.",
        ),
    ),
)
