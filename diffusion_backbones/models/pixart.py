"""PixArt-alpha and PixArt-Sigma. No recipe was published for them: read them with ``recipe=``.

Three of the six repositories hold a transformer alone; VAE and T5 come from the whole one of the same generation.
"""

from dataclasses import replace

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, HubFile, License
from diffusion_backbones.spec.registry import register_checkpoint

_ALPHA_DOUBT = (
    "Its VAE config was not read; it is taken to be Stable Diffusion's, and the scale 0.18215 is that of "
    "the authors' training configs."
)
_SIGMA_DOUBT = (
    "Its VAE config was not read; it is taken to be SDXL's, and the scale 0.13025 is that of the authors' "
    "training configs."
)
_FILE = "transformer/diffusion_pytorch_model.safetensors"

PIXART_ALPHA_512 = register_checkpoint(
    Checkpoint(
        name="pixart_alpha_512",
        title="PixArt-alpha 512",
        hub_id="PixArt-alpha/PixArt-XL-2-512x512",
        revision="50f702106901db6d0f8b67eb88e814c56ded2692",
        license=License("openrail++"),
        paper=papers["chen2023pixartalpha"],
        input_size=512,
        family="pixart",
        unverified=(_ALPHA_DOUBT,),
    )
)

PIXART_ALPHA_256 = register_checkpoint(
    replace(
        PIXART_ALPHA_512,
        name="pixart_alpha_256",
        title="PixArt-alpha 256",
        input_size=256,
        denoiser=HubFile("PixArt-alpha/PixArt-XL-2-256x256", _FILE),
        unverified=(
            _ALPHA_DOUBT,
            "The files of its transformer's repository were not seen; its config is taken to be that of 512 with a "
            "sample size of 32.",
        ),
    )
)

PIXART_ALPHA_1024 = register_checkpoint(
    Checkpoint(
        name="pixart_alpha_1024",
        title="PixArt-alpha 1024",
        hub_id="PixArt-alpha/PixArt-XL-2-1024-MS",
        revision="b89adadeccd9ead2adcb9fa2825d3fabec48d404",
        license=License("openrail++"),
        paper=papers["chen2023pixartalpha"],
        input_size=1024,
        family="pixart",
        unverified=(_ALPHA_DOUBT,),
    )
)

PIXART_SIGMA_1024 = register_checkpoint(
    Checkpoint(
        name="pixart_sigma_1024",
        title="PixArt-Sigma 1024",
        hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        revision="e102b3591cc82e97071b8b4cb90d834d0c487207",
        license=License("openrail++"),
        paper=papers["chen2024pixartsigma"],
        input_size=1024,
        family="pixart",
        encoder_float16=False,
        unverified=(_SIGMA_DOUBT,),
    )
)

PIXART_SIGMA_512 = register_checkpoint(
    replace(
        PIXART_SIGMA_1024,
        name="pixart_sigma_512",
        title="PixArt-Sigma 512",
        input_size=512,
        denoiser=HubFile("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", _FILE, "6f96354752fad086907230f7c9256e3d163f1dab"),
    )
)

PIXART_SIGMA_256 = register_checkpoint(
    replace(
        PIXART_SIGMA_1024,
        name="pixart_sigma_256",
        title="PixArt-Sigma 256",
        input_size=256,
        license=License("openrail"),
        denoiser=HubFile("PixArt-alpha/PixArt-Sigma-XL-2-256x256", _FILE, "495cb1bafac48d71ca96761409c5fd7e48354df2"),
    )
)
