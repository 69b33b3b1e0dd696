"""Where concepts are in images: the attention that a network pays from the image to the words of its prompt, or what
attention gives image and concepts alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.families.transformer.concept_outputs import CONCEPTS, ConceptOutputs
from diffusion_backbones.loading.prompts import no_text_encoder
from diffusion_backbones.ops import recording
from diffusion_backbones.spec.activations import MAP, Site
from diffusion_backbones.spec.concepts import around, check_words, placed

METHODS = ("attention", "outputs")


class Asked(NamedTuple):
    """What a call for concepts runs.

    Attributes:
        prompt: What the network reads.
        site: Of the maps.
        beside: What the site needs beside what conditions the network.
    """

    prompt: str
    site: Site
    beside: Mapping[str, Tensor]


def find(
    backbone: BackboneState, words: Any, prompt: str | None, layers: str | Sequence[str] | None, method: str
) -> Asked:
    """What a call for concepts runs; see ``DiffusionBackbone.concepts``."""
    said, name = check_words(words), backbone.declaration.name
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if backbone.declaration.recipe.classes:
        raise ValueError(f"{name} reads no prompt but its classes, whose maps are levels; build it without classes=")
    return (_by_attention if method == "attention" else _by_outputs)(backbone, said, prompt, layers)


def _by_attention(
    backbone: BackboneState, words: Sequence[str], prompt: str | None, layers: str | Sequence[str] | None
) -> Asked:
    parts = _layers(backbone, layers)
    text, places = placed(words, prompt)
    if backbone.prompter.source is None:
        raise no_text_encoder(text)
    rows = backbone.prompter.rows(text, places)
    stride = backbone.architecture.concept_stride
    return Asked(text, Site("concepts", "", MAP, len(rows), stride, "map", parts=parts, rows=rows), {})


def _by_outputs(
    backbone: BackboneState, words: Sequence[str], prompt: str | None, layers: str | Sequence[str] | None
) -> Asked:
    network, name = backbone.architecture, backbone.declaration.name
    if not isinstance(network, ConceptOutputs):
        raise ValueError(
            f"{name} has no outputs of attention that concepts can have too; method='outputs' reads the networks of "
            "FLUX.1 and Stable Diffusion 3, such as flux_schnell, and method='attention' others"
        )
    names = network.concept_layers if layers is None else [layers] if isinstance(layers, str) else layers
    if not names:
        raise ValueError(
            f"no source says at which layers {name} is read; name some in layers=, such as ['vit-block9-attn-out']"
        )
    text = around(words, prompt)
    tokens = [_alone(backbone, word) for word in words]
    ends = accumulate(some.shape[1] for some in tokens)
    rows = tuple(tuple(range(end - some.shape[1], end)) for some, end in zip(tokens, ends, strict=True))
    site = network.concept_outputs(names, rows)
    _check_uncut(backbone, site.parts)
    return Asked(text, site, {CONCEPTS: torch.cat(tokens, 1).to(backbone.device, backbone.dtype)})


def _alone(backbone: BackboneState, word: str) -> Tensor:
    """(1, tokens, channels) of a word that is embedded by itself, without what the tokenizer puts around it."""
    [rows] = backbone.prompter.rows(word, {word: [(0, len(word))]})
    return backbone.prompter([word])["prompt_embeds"][:, list(rows)]


def stretched(maps: Tensor) -> Tensor:
    """(B, n, h, w), every map from 0 to 1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def _layers(backbone: BackboneState, names: str | Sequence[str] | None) -> tuple[Site, ...]:
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
    _check_uncut(backbone, parts)
    return tuple(dict.fromkeys(parts))


def _check_uncut(backbone: BackboneState, parts: Iterable[Site]) -> None:
    if any(not recording.available(backbone.denoiser, part) for part in parts):
        raise ValueError(
            f"{backbone.declaration.name} is cut behind the last activation of its recipe, and these concepts are read "
            "from layers behind it; build it with truncate=False, or give layers= that it has"
        )
