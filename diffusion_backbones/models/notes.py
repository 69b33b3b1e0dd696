"""Sentences that several recipes' ``notes`` share: where this package departs from most sources."""

from __future__ import annotations


def mode_of_posterior(source: str) -> str:
    """``source``: what the source does with the VAE's posterior, as in "GDF samples it"."""
    return f"The VAE posterior is read at its mode; {source}."


def fixed_noise(source: str) -> str:
    """``source``: how the source draws noise, as in "GDF draws it unseeded"."""
    return f"Noise is one fixed seeded canvas; {source}."


def aspect_ratio(source: str, *, size_conditioning: bool = False) -> str:
    """``source``: how the source resizes images, as in "CleanDIFT resizes images to squares".

    ``size_conditioning``: Whether the network is conditioned on the size of the image, as SDXL is.
    """
    return f"{source}; here the aspect ratio is kept{', in the size conditioning too' if size_conditioning else ''}."


def gdf(*, size_conditioning: bool = False) -> tuple[str, ...]:
    """Notes on every recipe of GDF; ``size_conditioning`` as for :func:`aspect_ratio`."""
    return (
        mode_of_posterior("GDF samples it, unseeded"),
        fixed_noise("GDF draws it unseeded"),
        aspect_ratio(
            "GDF squashes every image to a square and computes in float16", size_conditioning=size_conditioning
        ),
        "GDF gives all images of a dataset one string, such as 'a photo of a horse' for Horse-21; prompt= in a call "
        "does it.",
    )
