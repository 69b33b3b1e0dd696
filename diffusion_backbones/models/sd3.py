"""Stable Diffusion 3 and 3.5."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAESD3
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model


def _license(repo: str) -> License:
    return License("other", name="stabilityai-ai-community", link=f"https://huggingface.co/{repo}/blob/main/LICENSE.md")


SD3_MEDIUM = register_checkpoint(
    Checkpoint(
        name="sd3_medium",
        title="Stable Diffusion 3 medium",
        hub_id="stabilityai/stable-diffusion-3-medium-diffusers",
        license=_license("stabilityai/stable-diffusion-3-medium"),
        paper=papers["esser2024sd3"],
        input_size=1024,
        tiny_encoder=TAESD3,
        family="sd3",
        gated=True,
        encoder_float16=False,
    )
)

SD35_MEDIUM = register_checkpoint(
    Checkpoint(
        name="sd35_medium",
        title="Stable Diffusion 3.5 medium",
        hub_id="stabilityai/stable-diffusion-3.5-medium",
        revision="b940f670f0eda2d07fbb75229e779da1ad11eb80",
        license=_license("stabilityai/stable-diffusion-3.5-medium"),
        paper=papers["esser2024sd3"],
        input_size=1024,
        tiny_encoder=TAESD3,
        family="sd3",
        gated=True,
        encoder_float16=False,
        unverified=(
            "Its VAE, text encoder and scheduler configs were not read; they are taken to be those of 3.5 large.",
        ),
    )
)

SD35_LARGE = register_checkpoint(
    Checkpoint(
        name="sd35_large",
        title="Stable Diffusion 3.5 large",
        hub_id="stabilityai/stable-diffusion-3.5-large",
        revision="ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        license=_license("stabilityai/stable-diffusion-3.5-large"),
        paper=papers["esser2024sd3"],
        input_size=1024,
        tiny_encoder=TAESD3,
        family="sd3",
        gated=True,
        encoder_float16=False,
    )
)

SD35_LARGE_TURBO = register_checkpoint(
    Checkpoint(
        name="sd35_large_turbo",
        title="Stable Diffusion 3.5 large turbo",
        hub_id="stabilityai/stable-diffusion-3.5-large-turbo",
        license=_license("stabilityai/stable-diffusion-3.5-large-turbo"),
        paper=papers["esser2024sd3"],
        input_size=1024,
        tiny_encoder=TAESD3,
        family="sd3",
        gated=True,
        encoder_float16=False,
        unverified=(
            "None of its files was read; its configs are taken to be those of 3.5 large, of which it is a "
            "distillation. Its gate was not seen either.",
        ),
    )
)

register_model(
    SD3_MEDIUM,
    Recipe(
        name="seg4diff",
        levels=("vit-block9-cross-map",),
        timestep=515,
        without=("text_encoder_3",),
        input_size=640,
        paper=papers["kim2025seg4diff"],
        source="arXiv 2509.18096 and its code: configs/eval_ovss.yaml (block 9, 8 of 28 steps remain, 77 CLIP tokens)",
        notes=(
            "A map of attention, averaged over heads: channel i says how much a place looks at token i of the prompt, "
            "the start token being 0.",
            "Prompt with the names of the classes, or with a caption; under the empty prompt the tokens mean nothing.",
            "Seg4Diff draws the noise unseeded; here it is one fixed seeded canvas.",
            "The LoRA weights that Seg4Diff trains for its best figures are not part of this backbone.",
        ),
        unverified=(
            "The noise level 0.515 follows from 28 steps with the scheduler's shift of 3; that the code leaves this "
            "shift on was not confirmed.",
            "Without T5, diffusers' pipeline appends zeros to the CLIP tokens; Seg4Diff is taken not to.",
        ),
    ),
)

register_model(
    SD35_LARGE,
    Recipe(
        name="fuse2match",
        levels=(("vit-block24-q", "vit-block24-v", "vit-block25-q", "vit-block25-v"),),
        timesteps=(521, 621, 721),
        input_size=1024,
        paper=papers["fuse2match2025"],
        source="Fuse2Match (NeurIPS 2025), sections 5.1 and 5.3, tables 1 and 4; its code was not seen",
        notes=(
            "Queries and values of the image tokens in two blocks; positions are compared by the cosine.",
            "Fuse2Match prompts with 'A photo of a {category}.'; prompt= in a call does it.",
            "Its best figures add features of Stable Diffusion 2.1 and DINOv2, which are not part of this backbone.",
        ),
        unverified=(
            "Blocks 24 and 25 are taken to be counted from 0, and queries to be read before their norm.",
            "Features of the timesteps are taken to be averaged; the printed width leaves mean or sum, which for the "
            "cosine are the same.",
            "How noise is drawn: here it is one fixed seeded canvas, the same at every timestep.",
            "The timesteps 521, 621 and 721 are taken as what the network receives, with no shift for the resolution.",
            "The authors of the paper.",
        ),
    ),
)
