"""``create_model(encoder="tiny")``: a distilled image encoder in the place of a checkpoint's own, for about a ninth of
its operations.

Which one fits is declared with the checkpoint (:class:`~diffusion_backbones.spec.checkpoint.TinyEncoder`). Only its
encoder is built and read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusion_backbones.families import Architecture
from diffusion_backbones.families.image_encoders import ImageEncoder, get_image_encoder
from diffusion_backbones.loading import hub
from diffusion_backbones.loading.source import Source, WithComponent
from diffusion_backbones.spec.checkpoint import Checkpoint, TinyEncoder
from diffusion_backbones.spec.configs import CONFIGS, Config
from diffusion_backbones.spec.registry import get_checkpoint, list_checkpoints
from diffusion_backbones.spec.validation import closest

CHOICES = ("tiny",)
"""What ``create_model(encoder=)`` takes."""


def find(checkpoint: Checkpoint, encoder: str) -> TinyEncoder:
    """The encoder of that name that a checkpoint has.

    Raises:
        ValueError: There is none; what there is instead is said.
    """
    if encoder not in CHOICES:
        raise ValueError(
            f"encoder={encoder!r} is none of {', '.join(map(repr, CHOICES))}.{closest(str(encoder), CHOICES)} None is "
            "the checkpoint's own."
        )
    if checkpoint.tiny_encoder is None:
        known = ", ".join(name for name in list_checkpoints() if get_checkpoint(name).tiny_encoder)
        raise ValueError(f"no tiny encoder is known for the latents of {checkpoint.name}. These have one: {known}.")
    return checkpoint.tiny_encoder


def fitted(config: Config, network: Architecture, declared: ImageEncoder) -> dict[str, Any]:
    """A tiny encoder's config for the place of a network's own encoder, whose scaling it takes over: recipes that do
    not scale their latents need it.

    Args:
        config: The tiny encoder's.
        network: Has the weights' own encoder.
        declared: The encoder that it was distilled from.

    Raises:
        ValueError: It gives other latents, as for a fine-tune with another autoencoder.
    """
    own = network.image_encoder
    given = (config["latent_channels"], get_image_encoder(config).stride)
    wanted = (own.config.get("latent_channels", 4), own.stride)
    if given != wanted:
        says = [f"{channels} channels at stride {stride}" for channels, stride in (given, wanted)]
        raise ValueError(
            f"the tiny encoder of {network.name} gives latents of {says[0]}, and those of these weights have "
            f"{says[1]}; leave encoder= out"
        )
    shift, factor = own.scaling
    if (own.scaling, own.statistics) != (declared.scaling, declared.statistics):
        raise ValueError(
            f"the vae/config.json of these weights scales latents otherwise than that of {network.name}, which the "
            "tiny encoder stands for; leave encoder= out"
        )
    return {**config, "shift_factor": shift, "scaling_factor": factor}


def check_unscaled(config: Config | None, where: str) -> None:
    """Check that a published tiny encoder gives latents as denoisers take them; scaling is what :func:`fitted` adds.

    Raises:
        ValueError: Its config scales them.
    """
    if config and config["_class_name"] == "AutoencoderTiny":
        scaling = (config["scaling_factor"], config["shift_factor"] or 0)
        if scaling != (1, 0):
            raise ValueError(
                f"{where}: vae/config.json has scaling_factor and shift_factor {scaling}, and a tiny encoder is read "
                "with 1 and 0 alone"
            )


def source(tiny: TinyEncoder, base: Source, family: type[Architecture], cache_dir: str | Path | None) -> WithComponent:
    """A source with the weights of a tiny encoder for those of its own.

    Raises:
        ConnectionError: The hub does not give them.
    """
    if tiny.file:
        return hub.replaced(base, family.encoder, tiny.file, cache_dir)
    path = CONFIGS / tiny.configs / "diffusion_pytorch_model.safetensors"
    return WithComponent(base, family.encoder, partial(Path, path), {"path": str(path.parent)})
