"""Activation ids: the grammar, and where in a network each id lives.

The vocabulary is GDF's (https://arxiv.org/abs/2410.03558), because the published recipes are written in it. An id is
parsed into a typed :class:`ActivationId`; a family lists the :class:`Site` of every id that its network has, from the
architecture config alone; a :class:`Catalogue` looks ids up and explains the ones that are not there.

Four kinds of ids go beyond GDF: ``...-{self|cross}-out``, the output of an attention layer as DiffCut reads it
(https://arxiv.org/abs/2406.02842); ``encoder-level...``, fine maps of the image encoder, and ``up-level...-res-in``,
what enters a residual block with its skip, both as ODISE reads them (https://arxiv.org/abs/2303.04803); and any stock
module path such as ``up_blocks.1.resnets.2``. In transformers a site is one too (:class:`Site`) where GDF uses its id
for other blocks alone, such as the ``norm-out`` of DiT.

``attn[up_cross]`` and its relatives are GDF's aggregated attention, ``attn[cross@16]`` is VPD's: one activation, but
many layers (:mod:`diffusion_backbones.spec.aggregated_attention`). They are found by id, and counted nowhere among the
others. So is one head of a query, key or value, ``vit-block17-q[head=2]``: that part of its channels.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusion_backbones.spec.suggestions import closest, nearest

_NUMBER = r"(?:0|[1-9][0-9]*)"
_BLOCK = rf"vit-block(?P<block>{_NUMBER})-(?P<kind>(?:self|cross)-(?:q|k|v|map|out)|ffn-inner|out)"
_STAGE = rf"(?P<stage>down|up)-level(?P<level>{_NUMBER})-"
_GRAMMAR = [
    rf"(?P<stage>encoder)-level(?P<level>{_NUMBER})-repeat(?P<repeat>{_NUMBER})-(?P<kind>res-out)",
    rf"(?P<stage>encoder)-level(?P<level>{_NUMBER})-(?P<kind>downsampler-out)",
    r"(?P<stage>unet)-(?P<kind>in|after-conv-in|out)",
    rf"{_STAGE}(?P<kind>downsampler-out|upsampler-out)",
    rf"{_STAGE}repeat(?P<repeat>{_NUMBER})-(?P<kind>res-increment|res-out|vit-out)",
    rf"(?P<stage>up)-level(?P<level>{_NUMBER})-repeat(?P<repeat>{_NUMBER})-(?P<kind>res-in)",
    rf"{_STAGE}repeat(?P<repeat>{_NUMBER})-{_BLOCK}",
    rf"(?P<stage>mid)-repeat(?P<repeat>{_NUMBER})-(?P<kind>res-increment|res-out)",
    r"(?P<stage>mid)-(?P<kind>vit-out)",
    rf"(?P<stage>mid)-{_BLOCK}",
    rf"(?P<stage>vit)-block(?P<block>{_NUMBER})-(?P<kind>(?:self|cross)-(?:q|k|v|map|out)|q|k|v|attn-out|norm-out|ffn-inner|out)",
    r"attn\[(?P<stage>down|mid|up)_(?P<kind>self|cross)\]",
    rf"(?P<stage>attn)\[(?P<kind>cross)@{_NUMBER}\]",
]
_PATTERNS = [re.compile(pattern) for pattern in _GRAMMAR]
_HEAD = re.compile(rf"(?P<whole>.+)\[head=(?P<head>{_NUMBER})\]")
_PROJECTION = re.compile(r".+-[qkv]")
_MODULE_PATH = re.compile(rf"[A-Za-z_]\w*(?:\.(?:[A-Za-z_]\w*|{_NUMBER}))+")

Layout = Literal["map", "tokens", "attention", "vector"]


@dataclass(frozen=True)
class ActivationId:
    """An id, taken apart. Numbers that an id does not have are None.

    Args:
        text: The id as written.
        stage: ``unet``, ``down``, ``mid``, ``up``, ``vit`` (a transformer), ``encoder``, ``attn`` (layers of all
            stages), or ``module`` for a stock module path.
        level: Resolution, counted in execution order: ``down`` 0 is the finest, ``up`` 0 the coarsest.
        repeat: Residual block within the level.
        block: Transformer block, within its ViT for U-Nets and in the whole network for transformers.
        kind: What is read there: ``res-out``, ``self-k``, ``ffn-inner`` ...; ``self`` or ``cross`` of ``attn[...]``.
        head: Which head of a query, key or value; None for all.
    """

    text: str
    stage: str
    kind: str = ""
    level: int | None = None
    repeat: int | None = None
    block: int | None = None
    head: int | None = None

    @property
    def in_gdf(self) -> bool:
        """Whether GDF's grammar has this id."""
        beyond = ("self-out", "cross-out", "res-in")
        inside = self.stage not in ("module", "encoder", "attn") and self.head is None
        return inside and not self.kind.endswith(beyond)


def parse(text: str) -> ActivationId:
    """Parse an activation id or a stock module path.

    Raises:
        ValueError: ``text`` is in neither form, or names a text-side activation (``cross-k``, ``cross-v``), or a head
            of what has none.
    """
    if not isinstance(text, str):
        raise ValueError(f"an activation id is a string, got {text!r}")
    if match := _HEAD.fullmatch(text):
        whole = parse(match["whole"])
        if whole.head is not None or not _PROJECTION.fullmatch(whole.text):
            raise ValueError(
                f"{text!r}: only queries, keys and values have heads, as in 'vit-block9-q[head=2]'; {match['whole']!r} "
                "is none of them"
            )
        return replace(whole, text=text, head=int(match["head"]))
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            groups = match.groupdict()
            if groups["kind"] in ("cross-k", "cross-v"):
                raise ValueError(
                    f"{text!r} is on the text side (batch, tokens, channels), not in the image; use the cross-q or "
                    "cross-map of that block"
                )
            numbers = {k: int(groups[k]) for k in ("level", "repeat", "block") if groups.get(k) is not None}
            return ActivationId(text, groups["stage"], groups["kind"], **numbers)
    if _MODULE_PATH.fullmatch(text):
        return ActivationId(text, "module")
    raise ValueError(
        f"{text!r} is not an activation id. Examples: 'up-level1-repeat1-vit-block0-cross-q', 'mid-vit-out', "
        "'up-level2-upsampler-out', 'unet-out', 'attn[up_cross]', 'vit-block9-q', or a stock module path with a dot "
        "such as 'up_blocks.1.resnets.2'."
    )


@dataclass(frozen=True)
class Port:
    """The tensor that is read of a module.

    Args:
        side: ``out`` its output, ``in`` its first input, ``map`` attention probabilities that are recomputed from
            queries and keys, ``outputs`` what is alike in outputs of attention.
        index: Which element of an output that is a tuple.
        tokens: Which tokens of a sequence of text and image belong to the image: ``all``, the ``last`` behind those of
            the text, or the ``first``.
        part: Which of the equal parts of the channels, for one head, and for layers that compute several projections at
            once.
    """

    side: Literal["out", "in", "map", "outputs"] = "out"
    index: int | None = None
    tokens: Literal["all", "last", "first"] = "all"
    part: int | None = None

    def __str__(self) -> str:
        """As an index: ``out``, ``out[1]``, ``in[:, T:]`` behind T text tokens, ``out[:, :N]``, ``out[:, T:, 0]``,
        ``out[:, :, 2]``.
        """
        rows = {"all": "" if self.part is None else ":", "last": "T:", "first": ":N"}[self.tokens]
        if rows:
            return f"{self.side}[:, {rows}{'' if self.part is None else f', {self.part}'}]"
        return self.side if self.index is None else f"{self.side}[{self.index}]"

    @classmethod
    def parse(cls, text: str) -> Port:
        """Inverse of ``str``; pickles of version 0.1 hold ports as text."""
        side, _, index = text.rstrip("]").partition("[")
        whole, _, part = index.removeprefix(":, ").partition(", ")
        tokens = {"T:": "last", ":N": "first"}.get(whole, "all")
        number = int(whole) if whole.isdigit() else None
        return cls(side, number, tokens, int(part) if part else None)  # type: ignore[arg-type]


OUT, IN, MAP, OUTPUTS = Port("out"), Port("in"), Port("map"), Port("outputs")


@dataclass(frozen=True)
class Site:
    """Where an activation is produced and what it looks like.

    Args:
        id: The activation id.
        path: Module path in the stock diffusers network.
        port: The tensor that is read of that module.
        channels: Channels of the activation; for ``map`` the number of heads.
        stride: Pixels of the input image per position.
        layout: ``map`` (B, C, h, w), ``tokens`` (B, h·w, C) in row-major order, or ``attention`` (B, heads, h·w, keys),
            or ``vector`` (B, C) for activations without positions. An aggregated map whose keys are places is
            ``attention`` of (B, keys, h, w).
        taps: For ``map``, the children of the module whose outputs it is computed from.
        modulation: For the output of a transformer block, the layer whose output begins with the shift and the scale
            that the next block's adaptive LayerNorm gives it; empty where there is none.
        encoder: Whether it is in the image encoder, and not in the denoiser.
        extension: Whether GDF has no such activation in this kind of block, though its grammar has the id.
        parts: For aggregated attention and for concepts, what they are made of, in forward order.
        rows: For concepts, the tokens of the text that each is read from.
    """

    id: str
    path: str
    port: Port
    channels: int
    stride: int
    layout: Layout
    taps: tuple[str, ...] = ("to_q", "to_k")
    modulation: str = ""
    encoder: bool = False
    extension: bool = False
    parts: tuple[Site, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def reads_text(self) -> bool:
        """Whether it has a value for each token of the text."""
        return self.id.endswith(("cross-map", "_cross]")) or self.id.startswith("attn[cross@")

    def over_text(self, tokens: int) -> Site:
        """The site as part of a level: attention to a text is averaged over heads and has one channel per token; other
        sites stay as they are.
        """
        return replace(self, channels=tokens, layout="tokens") if self.id.endswith("cross-map") else self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of version 0.1 hold the port as text."""
        port = state["port"]
        self.__dict__.update(state | {"port": Port.parse(port) if isinstance(port, str) else port})

    @property
    def modulation_site(self) -> Site:
        """The site of the shift and scale that modulate this activation, (B, at least 2 C)."""
        return Site(f"{self.id}|modulation", self.modulation, OUT, self.channels, self.stride, "vector")

    @property
    def modules(self) -> tuple[str, ...]:
        """The module paths whose output must be recorded, in execution order."""
        if self.parts:
            return tuple(path for part in self.parts for path in part.modules)
        return tuple(f"{self.path}.{tap}" for tap in self.taps) if self.port.side == "map" else (self.path,)


class Catalogue(Mapping[str, Site]):
    """Every activation of one network, in forward order, by id.

    Iterating gives GDF's ids; :meth:`all` adds the extensions. Looking up works for ids, extensions, aggregated
    attention, single heads and module paths.

    Args:
        sites: In forward order.
        network: What to call the network in errors.
        find_module: Finds the site of a stock module path that no id names; raises ``KeyError`` for a path that the
            network does not have.
        aggregated: Attention of several layers, which belongs to no place in the order.
    """

    _aggregated: Mapping[str, Site] = {}  # never changed: pickles of version 0.1 have no other

    def __init__(
        self,
        sites: Iterable[Site],
        network: str,
        find_module: Callable[[str], Site] | None = None,
        aggregated: Iterable[Site] = (),
    ):
        self._sites = {site.id: site for site in sites}
        self._aggregated = {site.id: site for site in aggregated}
        self._paths = {
            site.path: site for site in self._sites.values() if site.port.side == "out" and site.port.part is None
        }
        self.network, self._find_module = network, find_module

    def __getitem__(self, name: str) -> Site:
        """The site of an id or module path.

        Raises:
            ValueError: The name is not an id at all.
            KeyError: This network has no such activation; the message names the closest that it has. Or no such head.
        """
        try:
            parsed = parse(name)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}.{closest(str(name), self._sites)}") from None
        if parsed.head is not None:
            return self._one_head(name, parsed.head)
        if site := self._sites.get(name) or self._aggregated.get(name):
            return site
        if parsed.stage == "module":
            if name in self._paths:
                return replace(self._paths[name], id=name)
            if self._find_module is not None:
                try:
                    return self._find_module(name)
                except KeyError as error:
                    raise KeyError(f"{error.args[0]}.{closest(name, self._paths)}") from None
        if parsed.stage == "encoder" and not any(site.encoder for site in self._sites.values()):
            raise KeyError(
                f"{self.network} has no activation {name!r}: its image encoder has no readable activations (tiny "
                "encoders never do)"
            )
        near = nearest(name, [*self._sites, *self._aggregated, *self._paths], cutoff=0.4)
        raise KeyError(
            f"{self.network} has no activation {name!r}. The closest it has: {', '.join(near)}. `diffusion-backbones "
            "activations` lists them all."
        )

    def _one_head(self, name: str, head: int) -> Site:
        """The site of one head. Queries have as many heads as their layer's map, and all heads are equally wide; keys
        and values may have fewer, each for several queries.
        """
        whole = self[name.partition("[")[0]]
        layer = name.rpartition("-")[0]
        kind = "-map" if layer.endswith(("-self", "-cross")) else "-self-map"
        width = self._sites[f"{layer}-q"].channels // self._sites[layer + kind].channels
        heads = whole.channels // width
        if head >= heads:
            raise KeyError(f"{self.network}: {whole.id} has {heads} heads, 0 to {heads - 1}, and no head {head}")
        port = replace(whole.port, part=(whole.port.part or 0) * heads + head)
        return replace(whole, id=name, port=port, channels=width)

    def __contains__(self, name: object) -> bool:
        return name in self._sites or name in self._aggregated or name in self._paths

    def __iter__(self) -> Iterator[str]:
        return (name for name, site in self._sites.items() if parse(name).in_gdf and not site.extension)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def all(self) -> list[Site]:
        """Every site, GDF's and the extensions, in forward order."""
        return list(self._sites.values())

    def find(self, pattern: str = "*", extensions: bool = False) -> list[Site]:
        """Sites whose id is, or matches, a shell-style pattern, in forward order. Aggregated attention is last, and not
        in ``*``, since it is made of the others.
        """
        sites = self.all() if extensions else [self._sites[name] for name in self]
        if extensions and pattern != "*":
            sites += self._aggregated.values()
        return [site for site in sites if site.id == pattern or fnmatch.fnmatchcase(site.id, pattern)]
