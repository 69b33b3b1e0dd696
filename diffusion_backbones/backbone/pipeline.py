"""The pipeline of one call, in the order of the data: pad, encode, noise, denoise, levels, pyramid.

::

    x        (B, 3, H, W) in the backbone's input format
    pad      on the right and bottom, with mid-grey, to size_divisibility
    z        the image encoder's latents, scaled
    z_t      alpha_t z + sigma_t noise, or by inversion
    denoise  up to the recipe's last activation, once for every timestep
    levels   tokens -> maps, concatenated along channels, cropped to ceil(H / stride) x ceil(W / stride); what was
             fitted of them applied
    pyramid  a list of maps, fine to coarse
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_backbones.backbone.call_arguments import (
    Call,
    check_image,
    check_latents,
)
from diffusion_backbones.backbone.conditioning import embedded, merge_conditioning
from diffusion_backbones.backbone.device import check_device
from diffusion_backbones.backbone.inversion import inverted
from diffusion_backbones.backbone.out_of_memory import check_draws, check_maps, explain_oom
from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.ops import combining, micro_batching, noise, postprocessing, pyramid
from diffusion_backbones.ops.autocast import autocast_off, casts_to_float16
from diffusion_backbones.ops.noise import Timestep
from diffusion_backbones.ops.pixel_values import to_symmetric
from diffusion_backbones.ops.recording import StreamingStore, collect, keep_output_in_graph
from diffusion_backbones.ops.tensor_checks import ValueChecks
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.concepts import check_filled
from diffusion_backbones.spec.levels import LevelInfo
from diffusion_backbones.surgery import compilation
from diffusion_backbones.surgery.plan import unique_sites

Activations = dict[str, Tensor]
"""Id -> activation."""
Visit = Callable[[Site, Tensor], None]
"""Called with a site and what it gave, while the network runs."""


class Latents(NamedTuple):
    """What the denoiser starts from.

    Attributes:
        z: (B, C, h, w) clean latents.
        size: Height and width in pixels of the image before padding.
        encoder_acts: Id -> map of those activations that are in the image encoder.
    """

    z: Tensor
    size: tuple[int, int]
    encoder_acts: dict[str, Tensor]


# Pad and encode.


def start(backbone: BackboneState, x: Tensor | None, call: Call, sites: Iterable[Site]) -> Latents:
    """The latents of a call, from its image or as it gives them, and those of ``sites`` that are in the image encoder.

    Raises:
        TypeError: Both an image and latents, or neither.
        ValueError: They are not what they must be, or a site needs the image and latents were given.
    """
    if (x is None) == (call.latents is None):
        raise TypeError("give either images x or latents=")
    encoder_sites = [site for site in sites if site.encoder]
    if x is None:
        return given_latents(backbone, call.latents, None, encoder_sites)
    with backbone.encoder_recorder.recording(encoder_sites) as recorded:
        z = encode(backbone, x)
    acts = {site.id: compilation.own(backbone, collect(recorded, site)[0]).to(backbone.dtype) for site in encoder_sites}
    return Latents(z, (x.shape[-2], x.shape[-1]), acts)


def given_latents(
    backbone: BackboneState, z: Tensor, size: tuple[int, int] | None, encoder_sites: Iterable[Site]
) -> Latents:
    """Latents that a caller brings, checked.

    Raises:
        ValueError: They have another shape, or a site is read in the image encoder.
    """
    if wanted := [site.id for site in encoder_sites]:
        raise ValueError(
            f"{', '.join(wanted)} is read in the image encoder, so it needs the image, and latents were given; take "
            "other levels with indices="
        )
    network, values = backbone.architecture, ValueChecks()
    shape = (network.latent_channels, network.latent_stride, network.size_divisibility)
    size = check_latents(z, size, *shape)
    check_device("latents", z, backbone.denoiser, backbone.declaration.name)
    values.finite("latents", z, backbone.dtype)
    values.read()
    return Latents(z, size, {})


@explain_oom("image encoder")
def encode(backbone: BackboneState, x: Tensor) -> Tensor:
    """(B, 3, H, W) images -> (B, C, h, w) clean latents, padded and scaled; see ``DiffusionBackbone.encode``."""
    check_image(x, backbone.input_format, backbone.encoder_dtype)
    check_device("images", x, backbone.encoder, backbone.declaration.name)
    x, d = to_symmetric(x, backbone.input_format), backbone.size_divisibility
    x = F.pad(x, (0, -x.shape[-1] % d, 0, -x.shape[-2] % d))
    check_maps(backbone, x)
    encoder, full = backbone.architecture.image_encoder, backbone.encoder_overflows and casts_to_float16(x.device)
    check_encoder_dtype(backbone)
    x = compilation.prepare_input(backbone, x.to(backbone.encoder_dtype))
    with compilation.compile_context(backbone, backbone.encoder, x), autocast_off(x.device, full):
        z = compilation.own(backbone, encoder.encode(backbone.encoder, x))
    return encoder.scaled(z) if backbone.declaration.recipe.scaled else z


def check_encoder_dtype(backbone: BackboneState) -> None:
    """Raise ``ValueError`` if an image encoder that overflows in float16 was cast to it by itself."""
    if backbone.encoder_overflows and backbone.encoder_dtype == torch.float16:
        raise ValueError(
            f"the image encoder of {backbone.declaration.name} overflows in float16, and its weights were cast to it; "
            "cast the backbone as a whole, which leaves the encoder in float32, or build it with dtype='float16'"
        )


# Noise and denoise.


def activations(
    backbone: BackboneState,
    latents: Latents,
    call: Call,
    sites: Sequence[Site],
    average_heads: bool = False,
    visit: Visit | None = None,
    postprocess: Callable[[Activations], Activations] = dict,
) -> Activations:
    """Add noise to the latents, run the denoiser on them at one timestep after another, and read what it computed.

    Args:
        sites: In the denoiser.
        average_heads: Average attention maps over heads.
        visit: Takes each activation as it comes, one noise draw after another.
        postprocess: Done to the activations of each timestep, averaged over the ensemble, before they are combined.

    Returns:
        Id -> (B, ...), combined over timesteps; nothing with ``visit``.
    """
    if not sites:
        return {}
    z = latents.z
    b, values = z.shape[0], ValueChecks()  # len() would be a constant of an exported file
    conditioning = _conditioning(backbone, call, b, values)
    for name, given, dtype in (("noise", call.noise, backbone.dtype), *(("timestep", t, None) for t in call.timesteps)):
        if isinstance(given, Tensor):
            values.finite(name, given, dtype)
    values.read()
    check_draws(backbone, z, call.ensemble, call.chunk, sites)
    combined = combining.combiner(call.combine, len(call.timesteps))
    noisy = _noisy(backbone, latents, call, conditioning)
    for timestep in call.timesteps:
        z_t = noisy(timestep).to(backbone.dtype).view(call.ensemble, *z.shape)
        t = noise.timesteps(timestep, b, z.device)
        with backbone.at_timestep(timestep):
            acts = _ensemble(backbone, z_t, latents.size, t, conditioning, sites, average_heads, visit, call.chunk)
        combined.add(postprocess(acts), b)
    return combined.take()


def _noisy(
    backbone: BackboneState, latents: Latents, call: Call, conditioning: Mapping[str, Tensor]
) -> Callable[[Timestep], Tensor]:
    """What gives the noisy latents of all draws and images at each timestep of a call, all with the same noise."""
    z, several = latents.z, call.timesteps
    if isinstance(call.noise, str) and call.noise == "inversion":
        found = inverted(backbone, z, latents.size, conditioning, several, call.chunk)
        return dict(zip(several, found, strict=True)).__getitem__
    draws = _draw(backbone, z, call)
    return lambda timestep: noise.mix(z, draws, timestep, backbone.forward_process)


def _ensemble(
    backbone: BackboneState,
    z_t: Tensor,
    size: tuple[int, int],
    t: Tensor,
    conditioning: Mapping[str, Tensor],
    sites: Sequence[Site],
    average_heads: bool,
    visit: Visit | None,
    chunk: int | None,
) -> Activations:
    """(draws, B, C, h, w) noisy latents through the denoiser, at most ``chunk`` of them together, and the mean over
    draws.
    """
    parts = []
    for images, slices in micro_batching.split(z_t.shape[0], t.shape[0], chunk):
        mean = micro_batching.RunningMean(z_t.shape[0])
        text = {name: rows[images] for name, rows in conditioning.items()}
        for some in slices:
            acts = denoise(backbone, z_t[some, images], size, t[images], text, sites, average_heads, visit)
            mean.add(acts, t[images].shape[0])
        parts.append(mean.take())
    return micro_batching.cat(parts)


@explain_oom("noise")
def _draw(backbone: BackboneState, z: Tensor, call: Call) -> Tensor | None:
    """(draws, B or 1, C, h, w), or None; see :func:`~diffusion_backbones.ops.noise.draw`."""
    return noise.draw(z, call.noise, call.ensemble, _canvas(backbone, call, z), call.generator)


def _canvas(backbone: BackboneState, call: Call, z: Tensor) -> Tensor | None:
    """The fixed noise of a call's draws, cropped to its latents; None for other kinds of noise."""
    if not (isinstance(call.noise, str) and call.noise == "fixed"):
        return None
    height, width = z.shape[-2:]
    if backbone.canvas is not None and len(backbone.canvas) >= call.ensemble:
        return noise.crop(backbone.canvas[: call.ensemble], height, width)
    seed, channels = backbone.declaration.recipe.seed, backbone.architecture.latent_channels
    with backbone.device:
        return noise.canvas(seed, call.ensemble, channels, (height, width))


def _conditioning(backbone: BackboneState, call: Call, b: int, values: ValueChecks) -> dict[str, Tensor]:
    """The tensors that condition a call, with a batch axis of ``b``; checks of their values are added to others."""
    given, recipe = call.embeddings, backbone.declaration.recipe
    if call.labels is None and not given and not recipe.classes:
        check_filled(recipe.prompt if call.prompt is None else call.prompt)
    if call.prompt is not None or call.labels is not None:
        given = embedded(backbone.prompter, recipe, b, call.prompt, call.labels)
    own = dict(backbone.conditioning.items())
    tokens = own["prompt_embeds"].shape[1] if backbone.plan.reads_text else None
    beside = {name: tensor.expand(b, *tensor.shape[1:]) for name, tensor in call.beside.items()}
    return merge_conditioning(own, given, b, backbone.declaration.name, values, tokens) | beside


@explain_oom("denoiser")
def denoise(
    backbone: BackboneState,
    z_t: Tensor,
    size: tuple[int, int],
    t: Tensor,
    conditioning: Mapping[str, Tensor],
    sites: Sequence[Site],
    average_heads: bool,
    visit: Visit | None,
) -> dict[str, Tensor]:
    """(draws, B, C, h, w) noisy latents through the denoiser, all at once.

    Returns:
        Id -> (draws · B, ...), or nothing with ``visit``.
    """
    draws, network, stride = z_t.shape[0], backbone.architecture, backbone.latent_stride
    t = t.repeat(draws)
    conditioning = {name: rows.repeat(draws, *[1] * (rows.ndim - 1)) for name, rows in conditioning.items()}
    z_t = compilation.prepare_input(backbone, z_t.flatten(0, 1))

    def activation(site: Site, recorded: tuple[Tensor, ...]) -> Tensor:
        grid = (z_t.shape[-2] * stride // site.stride, z_t.shape[-1] * stride // site.stride)
        average = average_heads or site.layout == "tokens"
        return network.activation(backbone.denoiser, site, recorded, conditioning, grid, average)

    store = StreamingStore(sites, lambda site, recorded: visit(site, activation(site, recorded))) if visit else None
    told = compilation.compile_context(backbone, backbone.denoiser, z_t)
    with told, backbone.recorder.recording(sites, store) as recorded:
        output = network.call(backbone.denoiser, z_t, t, conditioning, size)
    if store is not None:
        store.close()
        return {}
    acts = {site.id: activation(site, collect(recorded, site)) for site in sites}
    acts = {name: compilation.own(backbone, act) for name, act in acts.items()}
    return {name: keep_output_in_graph(act, output) for name, act in acts.items()} if backbone.trainable else acts


# Levels and pyramid.


def feature_pyramid(backbone: BackboneState, latents: Latents, call: Call, indices: Sequence[int]) -> list[Tensor]:
    """Latents -> some of the maps that ``DiffusionBackbone.forward`` returns."""
    out = backbone.out_maps
    native = levels(backbone, latents, call, sorted({out[i].level for i in indices}))
    return _leaving(backbone, native, latents.size, indices)


def levels(backbone: BackboneState, latents: Latents, call: Call, wanted: Sequence[int]) -> dict[int, Tensor]:
    """Latents -> some levels by position, at their own strides, before anything that was fitted is applied."""
    plan = backbone.plan
    sites = unique_sites(backbone.levels[i] for i in wanted)
    inner = [site for site in sites if not site.encoder]
    acts = activations(
        backbone,
        latents,
        call,
        plan.recorded(inner),
        postprocess=lambda acts: postprocessing.apply(plan.declaration.recipe, inner, acts),
    )
    return _assembled(backbone, latents, wanted, sites, latents.encoder_acts | acts)


@explain_oom("pyramid")
def _assembled(
    backbone: BackboneState, latents: Latents, wanted: Sequence[int], sites: Sequence[Site], acts: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    maps = as_maps(backbone, latents.z, sites, acts)
    return {i: pyramid.assemble(backbone.levels[i], maps, latents.size) for i in wanted}


@explain_oom("pyramid")
def _leaving(
    backbone: BackboneState, native: Mapping[int, Tensor], size: tuple[int, int], indices: Sequence[int]
) -> list[Tensor]:
    fitted = {i: backbone.finish(backbone.levels[i], m) for i, m in native.items()}
    chosen = [backbone.out_maps[i] for i in indices]
    return [pyramid.resample(fitted[m.level], backbone.levels[m.level].stride, m.stride, size) for m in chosen]


def as_maps(backbone: BackboneState, z: Tensor, sites: Iterable[Site], acts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Activations of the padded image -> id -> (B, C, h, w), padding included."""
    height, width = (side * backbone.latent_stride for side in z.shape[-2:])
    return {site.id: pyramid.to_map(acts[site.id], site, height, width) for site in sites}


def single_map(backbone: BackboneState, latents: Latents, site: Site, act: Tensor) -> Tensor:
    """One activation of the padded image as a map (B, C, h, w), the padding cropped off."""
    return pyramid.assemble(LevelInfo((site,)), as_maps(backbone, latents.z, [site], {site.id: act}), latents.size)
