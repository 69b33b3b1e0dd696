"""Z-Image-Turbo of Tongyi-MAI. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAEF1
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

Z_IMAGE_TURBO = register_checkpoint(
    Checkpoint(
        name="z_image_turbo",
        title="Z-Image-Turbo",
        hub_id="Tongyi-MAI/Z-Image-Turbo",
        license=License("apache-2.0"),
        paper=papers["zimage2025"],
        input_size=1024,
        tiny_encoder=TAEF1,
        family="z_image",
        encoder_float16=False,
    )
)
