"""FLUX.2 of Black Forest Labs. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

_UNVERIFIED = (
    "The configs of its image encoder, language model and scheduler were not read; they follow diffusers' conversion "
    "script.",
)

FLUX2_DEV = register_checkpoint(
    Checkpoint(
        name="flux2_dev",
        title="FLUX.2 [dev]",
        hub_id="black-forest-labs/FLUX.2-dev",
        revision="26afe3a78bb242c0a8bb181dcc8937bb16e5c66c",
        license=License(
            "other",
            name="flux-dev-non-commercial-license",
            link="https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.md",
        ),
        paper=papers["flux2"],
        input_size=1024,
        family="flux2",
        gated=True,
        encoder_float16=False,
        unverified=_UNVERIFIED,
    )
)

FLUX2_KLEIN_4B = register_checkpoint(
    Checkpoint(
        name="flux2_klein_4b",
        title="FLUX.2 [klein] 4B",
        hub_id="black-forest-labs/FLUX.2-klein-4B",
        revision="e7b7dc27f91deacad38e78976d1f2b499d76a294",
        license=License("apache-2.0"),
        paper=papers["flux2"],
        input_size=1024,
        family="flux2",
        encoder_float16=False,
        unverified=(
            *_UNVERIFIED,
            "The depths and widths of its transformer are as several public implementations state them.",
        ),
    )
)
