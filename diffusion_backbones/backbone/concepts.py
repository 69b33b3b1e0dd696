"""Where concepts are in images: the attention that a network pays from the image to the words of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.loading.prompts import no_text_encoder
from diffusion_backbones.ops import recording
from diffusion_backbones.spec.activations import MAP, Site
from diffusion_backbones.spec.concepts import check_words, placed


def find(backbone: BackboneState, words: Any, prompt: str | None, layers: Sequence[str] | None) -> tuple[str, Site]:
    """The prompt of a call for concepts, and the site of their maps; see ``DiffusionBackbone.concepts``."""
    said = check_words(words)
    if backbone.declaration.recipe.classes:
        raise ValueError(
            f"{backbone.declaration.name} reads no prompt but its classes, whose maps are levels; build it without "
            "classes="
        )
    parts = _layers(backbone, layers)
    text, places = placed(said, prompt)
    if backbone.prompter.source is None:
        raise no_text_encoder(text)
    rows = backbone.prompter.rows(text, places)
    stride = backbone.architecture.concept_stride
    return text, Site("concepts", "", MAP, len(rows), stride, "map", parts=parts, rows=rows)


def stretched(maps: Tensor) -> Tensor:
    """(B, n, h, w), every map from 0 to 1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def _layers(backbone: BackboneState, names: Sequence[str] | None) -> tuple[Site, ...]:
    """The maps of attention that concepts are read from: those that are named, of the recipe, or of the whole network.

    Raises:
        KeyError, ValueError: There are none, they do not look at the text, or the network is cut before one.
    """
    network, name = backbone.architecture, backbone.declaration.name
    if not network.concept_sites or not network.words:
        why = "does not look at a text" if not network.concept_sites else "is given an instruction before the words"
        raise ValueError(
            f"{name} {why}, so it has no concepts; latent U-Nets and transformers that are given the prompt itself "
            "have, such as those of sd15, sdxl, sd3_medium and flux_dev"
        )
    if names is None:
        names = [site.id for site in backbone.plan.sites if site.reads_text]
    sites = [network.catalogue[layer] for layer in ([names] if isinstance(names, str) else names)]
    if other := next((site.id for site in sites if not site.reads_text), None):
        raise ValueError(f"layers={other!r} is no attention to the text; name ids that end in cross-map")
    parts = [part for site in sites for part in site.parts or (site,)] or network.concept_sites
    if any(not recording.available(backbone.denoiser, part) for part in parts):
        raise ValueError(
            f"{name} is cut behind the last activation of its recipe, and these concepts are read from layers behind "
            "it; build it with truncate=False, or give layers= that it has"
        )
    return tuple(dict.fromkeys(parts))
