"""Aggregated attention, ``attn[up_cross]`` and its relatives: the attention of many layers as one activation.

As GDF reads it (https://arxiv.org/abs/2410.03558, where the fused features of three networks contain it), and VPD
before: probabilities, averaged over heads, and over the layers of one direction that see the image at one size; every
size is enlarged to the finest of all, and they stand one behind another along channels, first that which runs first.
Cross-attention has one channel for each token of the text and size, self-attention one for each place.

``attn[cross@16]`` and its relatives are what VPD (https://arxiv.org/abs/2303.02153) puts beside features of that size:
cross-attention averaged over heads, and over all layers of one stride on the way down and up, at that stride.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from diffusion_backbones.spec.activations import MAP, Layout, Site, parse

STRIDE = 8
"""Pixels per position of an aggregated map."""
COARSEST = 32
"""Layers with more pixels per position take no part."""


def aggregated(sites: Sequence[Site], finest: int, tokens: int, side: int) -> Iterator[Site]:
    """The aggregated attention of a network.

    Args:
        sites: All of its denoiser, in forward order.
        finest: Layers with fewer pixels per position take no part.
        tokens: Of the text, keys of cross-attention.
        side: Of a square image in pixels, for which the keys of self-attention are counted.
    """
    for direction in ("down", "mid", "up"):
        for kind in ("cross", "self"):
            parts = tuple(site for site in sites if _takes_part(site, direction, kind, finest))
            if parts:
                keys = sum(tokens if kind == "cross" else (side // stride) ** 2 for stride in sizes(parts))
                layout: Layout = "map" if kind == "cross" else "attention"
                path = parts[0].path.partition(".")[0]
                yield Site(f"attn[{direction}_{kind}]", path, MAP, keys, STRIDE, layout, parts=parts)


def at_each_stride(sites: Sequence[Site], tokens: int) -> Iterator[Site]:
    """The attention to the text of all layers of one stride, fine to coarse.

    Args:
        sites: The maps of attention that take part.
        tokens: Of the text.
    """
    for stride in sorted({site.stride for site in sites}):
        parts = tuple(site for site in sites if site.stride == stride)
        path = parts[0].path.partition(".")[0]
        yield Site(f"attn[cross@{stride}]", path, MAP, tokens, stride, "map", parts=parts)


def sizes(parts: Iterable[Site]) -> list[int]:
    """The different strides of some maps, as they first run."""
    return list(dict.fromkeys(part.stride for part in parts))


def _takes_part(site: Site, direction: str, kind: str, finest: int) -> bool:
    if not site.id.endswith(f"{kind}-map") or not finest <= site.stride <= COARSEST:
        return False
    stage = parse(site.id).stage
    return direction == ("up" if stage == "vit" else stage)  # GDF calls all of a transformer so
