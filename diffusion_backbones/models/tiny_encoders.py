"""Tiny image encoders: TAESD and its relatives, which Ollin Boer Bohan distilled from the autoencoders of published
models.

The repositories hold diffusers' ``AutoencoderTiny``, encoder and decoder in one file. Which family each fits is said in
the README of github.com/madebyollin/taesd; that Z-Image has the autoencoder of FLUX.1, too.
"""

from diffusion_backbones.spec.checkpoint import HubFile, License, TinyEncoder

_SOURCE = "https://github.com/madebyollin/taesd"


def _published(name: str) -> TinyEncoder:
    return TinyEncoder(
        name, License("mit"), HubFile(f"madebyollin/{name}", "diffusion_pytorch_model.safetensors"), _SOURCE
    )


TAESD = _published("taesd")  # Stable Diffusion 1 and 2
TAESDXL = _published("taesdxl")
TAESD3 = _published("taesd3")  # Stable Diffusion 3 and 3.5
TAEF1 = _published("taef1")  # FLUX.1, Z-Image
