"""CleanDIFT: Stable Diffusion U-Nets fine-tuned to give the features of noisy images for clean ones.

The repository holds U-Nets only; the VAE and the text encoder come from the Stable Diffusion they were tuned from.
"""

from dataclasses import replace

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.stable_diffusion import SD15, SD21
from diffusion_backbones.spec.checkpoint import HubFile, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

_LICENSE = License("mit", link="https://huggingface.co/CompVis/cleandift")
_LICENSE_UNVERIFIED = (
    "The weights are published under MIT; whether the licence of the base model binds them too is not settled."
)

CLEANDIFT_SD15 = register_checkpoint(
    replace(
        SD15,
        name="cleandift_sd15",
        title="CleanDIFT on Stable Diffusion 1.5",
        configs="sd15",
        denoiser=HubFile("CompVis/cleandift", "cleandift_sd15_unet.safetensors"),
        license=_LICENSE,
        paper=papers["stracke2025cleandift"],
        unverified=(*SD15.unverified, _LICENSE_UNVERIFIED),
    )
)

CLEANDIFT_SD21 = register_checkpoint(
    replace(
        SD21,
        name="cleandift_sd21",
        title="CleanDIFT on Stable Diffusion 2.1",
        configs="sd21",
        denoiser=HubFile("CompVis/cleandift", "cleandift_sd21_unet.safetensors"),
        license=_LICENSE,
        paper=papers["stracke2025cleandift"],
        unverified=(*SD21.unverified, _LICENSE_UNVERIFIED),
    )
)

_NOTES = (
    notes.mode_of_posterior("CleanDIFT samples it, unseeded"),
    "CleanDIFT prompts 'A photo of a {category}'; prompt= in a call does it.",
    notes.aspect_ratio("CleanDIFT resizes images to squares"),
)
_TIMESTEP_UNVERIFIED = (
    "The timestep was learned in training from a start at 261; the U-Net file carries none, so 261 "
    "is used and assumed to have moved little."
)

register_model(
    CLEANDIFT_SD15,
    Recipe(
        name="cleandift",
        levels=("up-level2-repeat1-vit-out", "up-level1-repeat1-vit-out", "up-level0-repeat1-res-out"),
        timestep=261,
        noise="none",
        input_size=512,
        paper=papers["stracke2025cleandift"],
        source="CompVis/cleandift at b070976, src/sd_feature_extraction.py (us8, us5, us2)",
        notes=(
            *_NOTES,
            "The source concatenates these activations with DINOv2 features, which are not part of this pyramid.",
            "Appendix A of the paper names the activations #2, #6 and #8, its code us2, us5 and us8; the code is "
            "followed.",
        ),
        unverified=(_TIMESTEP_UNVERIFIED,),
    ),
    name="sd15_cleandift",
)

register_model(
    CLEANDIFT_SD21,
    Recipe(
        name="cleandift",
        levels=("up-level1-upsampler-out",),
        timestep=261,
        noise="none",
        input_size=768,
        paper=papers["stracke2025cleandift"],
        source="CompVis/cleandift at b070976, src/sd_feature_extraction.py (us6) and "
        "notebooks/get_correspondences.ipynb",
        notes=(*_NOTES, "CleanDIFT's notebooks compute in bfloat16."),
        unverified=(_TIMESTEP_UNVERIFIED,),
    ),
    name="sd21_cleandift",
)
