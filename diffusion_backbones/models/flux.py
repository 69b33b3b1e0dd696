"""FLUX.1 of Black Forest Labs."""

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAEF1
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

FLUX_DEV = register_checkpoint(
    Checkpoint(
        name="flux_dev",
        title="FLUX.1 [dev]",
        hub_id="black-forest-labs/FLUX.1-dev",
        revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        license=License(
            "other",
            name="flux-1-dev-non-commercial-license",
            link="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        ),
        paper=papers["flux2024"],
        input_size=1024,
        tiny_encoder=TAEF1,
        family="flux",
        gated=True,
        encoder_float16=False,
    )
)

FLUX_SCHNELL = register_checkpoint(
    Checkpoint(
        name="flux_schnell",
        title="FLUX.1 [schnell]",
        hub_id="black-forest-labs/FLUX.1-schnell",
        revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
        license=License("apache-2.0"),
        paper=papers["flux2024"],
        input_size=1024,
        tiny_encoder=TAEF1,
        family="flux",
        gated=True,
        encoder_float16=False,
        unverified=("Whether its VAE must run in float32 is not certain: of two copies of its config one says so.",),
    )
)

MASSIVE_CHANNELS = (154, 1446)
"""Channels of the residual stream that dwarf all others (DiTF, eval_spair.py)."""
_NOTES = (
    "Block k of DiTF reads the stream before it, that is the output of block k - 1, and modulates it as block k does.",
    notes.mode_of_posterior("DiTF samples it"),
    "DiTF draws its noises unseeded; here they are fixed seeded canvases.",
)

register_model(
    FLUX_DEV,
    Recipe(
        name="ditf",
        levels=("vit-block27-out",),
        timestep=260,
        ensemble=8,
        discard=MASSIVE_CHANNELS,
        normalize="adaptive",
        input_size=640,
        paper=papers["gan2025ditf"],
        source="arXiv 2505.18584 and its code: eval_spair.py, src/flux/model.py (k = 28, t = 0.260)",
        notes=(
            *_NOTES,
            "DiTF prompts with a caption of each image, or with 'a photo of a {category}'; prompt= in a call does it.",
            "DiTF resizes the longer side to 640 pixels and keeps the aspect ratio.",
        ),
    ),
)

register_model(
    FLUX_DEV,
    Recipe(
        name="ditf_tracking",
        levels=("vit-block23-out",),
        timestep=90,
        discard=MASSIVE_CHANNELS,
        normalize="adaptive",
        prompt="a photo of a image",
        input_size=960,
        paper=papers["gan2025ditf"],
        source="arXiv 2505.18584, README for DAVIS (k = 24, t = 0.090, one noise)",
        notes=(*_NOTES, "The README says 960 pixels, the script eval_davis.sh 480."),
        unverified=(
            "That the two massive channels are dropped for tracking too is taken over from the correspondence script.",
        ),
    ),
)

register_model(
    FLUX_DEV,
    Recipe(
        name="dtm_mean",
        levels=("vit-block27-out",),
        timesteps=range(20, 621, 20),
        discard=MASSIVE_CHANNELS,
        normalize="adaptive",
        input_size=960,
        paper=papers["dtm2026"],
        source="arXiv 2609.15357, the row that averages over t = 20 ... 620 and trains nothing; its code was not seen",
        notes=(
            *_NOTES[:1],
            "The feature is DiTF's; the same noise is used at every timestep.",
            "The sequence model over timesteps that the paper trains for its best figures is no part of this backbone.",
        ),
        unverified=(
            "The full title and the authors of the paper.",
            "The number of noise draws of each timestep is taken to be one, and the prompt to be empty.",
            "The mean is taken to be that of the modulated features, without the two massive channels.",
        ),
    ),
)
