"""DiT-XL/2, class-conditional on ImageNet at 256 and 512 pixels."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

_LICENSE = License("cc-by-nc-4.0", link="https://github.com/facebookresearch/DiT/blob/main/LICENSE.txt")
_DOUBT = (
    "Its VAE config was not read; it is taken to be Stable Diffusion's, whose latents the authors multiply by 0.18215."
)

DIT_XL_256 = register_checkpoint(
    Checkpoint(
        name="dit_xl_256",
        title="DiT-XL/2 256",
        hub_id="facebook/DiT-XL-2-256",
        revision="refs/pr/1",  # main holds pickles only; this pull request adds safetensors
        license=_LICENSE,
        paper=papers["peebles2023dit"],
        input_size=256,
        family="dit",
        unverified=(_DOUBT,),
    )
)

DIT_XL_512 = register_checkpoint(
    Checkpoint(
        name="dit_xl_512",
        title="DiT-XL/2 512",
        hub_id="facebook/DiT-XL-2-512",
        license=_LICENSE,
        paper=papers["peebles2023dit"],
        input_size=512,
        family="dit",
        unverified=(_DOUBT, "Whether its repository holds safetensors files was not seen; pickles are refused."),
    )
)

register_model(
    DIT_XL_256,
    Recipe(
        name="ddae",
        levels=("vit-block13-out",),
        timestep=121,
        input_size=256,
        paper=papers["xiang2023ddae"],
        source="arXiv 2303.09769: block 13 counted from 0, t = 121 on CIFAR-10",
        notes=(
            "DDAE averages the tokens of the block into one vector and trains a linear classifier on it; here they "
            "stay a map. On Tiny-ImageNet it uses t = 81.",
            "DDAE draws the noise unseeded; here it is one fixed seeded canvas.",
            "The network is given the null class; class_labels= in a call gives another.",
        ),
    ),
)
