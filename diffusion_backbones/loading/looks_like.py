"""Whether a file's denoiser is the network that was asked for, and if not, which registered names read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from diffusion_backbones.families import FAMILIES, Architecture, architecture
from diffusion_backbones.loading import layouts
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.registry import get_checkpoint, get_declaration, list_checkpoints, list_models

Shapes = Mapping[str, tuple[int, ...]]

_MORE_CHANNELS = {9: "inpainting networks", 8: "InstructPix2Pix and Marigold", 7: "upscalers", 5: "depth networks"}
"""Channels that a U-Net takes -> whose it is, where the first four are those of the latents."""


def difference(shapes: Shapes, network: Architecture) -> str:
    """How a denoiser with diffusers' names differs from a network, as the rest of a sentence; empty where it does not,
    as far as the sizes of its layers say.

    Args:
        shapes: Name -> shape of what was found.
        network: What was asked for.
    """
    owners = {name.rpartition(".")[0] for name in shapes}
    sites = [site for site in network.sites() if site.port.side == "out" and site.port.part is None]
    for site in sites:
        found = shapes.get(f"{site.path}.weight", (site.channels,))
        if site.path.endswith("to_q") and site.path not in owners:
            return f"it has no {site.path}"
        if site.path.endswith(("to_q", "to_k", "to_v")) and found[0] != site.channels:
            return f"its {site.path} gives {found[0]} channels and not {site.channels}"
    return _unet_difference(shapes, network) if isinstance(network, FAMILIES["unet"]) else ""


def _unet_difference(shapes: Shapes, network: Architecture) -> str:
    config = network.config
    taken, latents = shapes.get("conv_in.weight", (0, network.latent_channels))[1], network.latent_channels
    if taken != latents:
        whose = _MORE_CHANNELS.get(taken)
        return f"it takes {taken} channels where latents have {latents}" + (
            f", as {whose} do, which are not read" if whose and latents == 4 else ""
        )
    known = {site.path for site in network.sites()}
    extra = [
        name for name in shapes if name.endswith("attn1.to_q.weight") and name.removesuffix(".weight") not in known
    ]
    if extra:
        return f"it also has {extra[0].removesuffix('.attn1.to_q.weight')}"
    words = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    wanted = config.get("cross_attention_dim")
    if words and isinstance(wanted, int) and words != {wanted}:
        return f"it is for text of {', '.join(map(str, words))} channels and not {wanted}"
    axes = {len(shape) for name, shape in shapes.items() if re.search(r"attentions\.\d+\.proj_in\.weight$", name)}
    if axes and axes != {2 if config.get("use_linear_projection") else 4}:
        kinds = ("convolutions", "linear layers")[:: 1 if config.get("use_linear_projection") else -1]
        return f"its transformers begin with {kinds[0]} and not {kinds[1]}"
    return ""


def has_layers(shapes: Shapes, network: Architecture) -> bool:
    """Whether a denoiser with diffusers' names has the layers of a network, of any width."""
    return _alike(shapes, _shapes(network))


def _shapes(network: Architecture) -> Shapes:
    with safetensors_io.unfilled():
        return safetensors_io.shapes(network.build_denoiser())


def _alike(found: Shapes, full: Shapes) -> bool:
    return set(full) <= set(found) and all(len(found[name]) == len(shape) for name, shape in full.items())


def readers(names: Collection[str], convert: Callable[[Architecture], Shapes | None]) -> str:
    """Which registered checkpoints read a file's denoiser, as a sentence; empty where none does.

    It is compared with every architecture that travels with the package: those that fit exactly are named, else those
    that differ in widths alone.

    Args:
        names: Of the denoiser's tensors, without what stands before them.
        convert: Network -> the shapes of those tensors in diffusers' names, None where they are not of its kind.
    """
    author = layouts.author(names)
    exact: list[str] = []
    alike: list[str] = []
    for config_name in dict.fromkeys(get_checkpoint(name).config_name for name in list_checkpoints()):
        group = [name for name in list_checkpoints() if get_checkpoint(name).config_name == config_name]
        checkpoint = get_checkpoint(group[0])
        if author not in (None, checkpoint.family):
            continue
        network = architecture(checkpoint)
        if not author and not layouts.named_as_diffusers(names, network):
            continue
        found = convert(network)
        full = _shapes(network)
        if found and _alike(found, full):
            exact += group if all(found[name] == shape for name, shape in full.items()) else []
            alike += group
    if not (exact or alike):
        return ""
    if not exact:
        return (
            f"It has the layers, though not the widths, of {_few(alike)}; with its own configs, in a folder in the "
            "diffusers layout, any width is read."
        )
    backbones = [name for name in list_models() if get_declaration(name).checkpoint.name in exact]
    example = f"create_model({backbones[0]!r}, ...)" if backbones else f"create_model({exact[0]!r}, recipe=[...])"
    return f"It is read as {_few(exact)}: {example}."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
