"""DeepFloyd IF, first stage, on pixels. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

DEEPFLOYD_IF_XL = register_checkpoint(
    Checkpoint(
        name="deepfloyd_if_xl",
        title="DeepFloyd IF I XL",
        hub_id="DeepFloyd/IF-I-XL-v1.0",
        license=License(
            "other",
            name="deepfloyd-if-license",
            link="https://github.com/deep-floyd/IF/blob/73332927001f82a1bf130fad0256b32a6d718fb2/LICENSE-MODEL",
        ),
        paper=papers["deepfloyd2023if"],
        input_size=64,
        family="deepfloyd",
        gated=True,
        unverified=(
            "The end of its U-Net config was not read (up_block_types, upcast_attention, use_linear_projection); it "
            "is what diffusers' conversion makes "
            "of the authors' config.yml.",
            "The config of its text encoder was not read; it is taken to be that of T5 v1.1 XXL, which the conversion "
            "loads.",
        ),
    )
)
