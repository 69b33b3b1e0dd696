"""What a fusion is: its members, its levels, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.fusion.copies import freeze_unread
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops.principal_components import PrincipalComponents
from diffusion_backbones.spec.fused_levels import FusedLevel, Source, fused_levels
from diffusion_backbones.spec.fusion import Fusion, fusion_cfg
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.levels import OutMap, out_maps, take


class FusionState(Backbone):
    """What a fusion is: its members, its levels, and what follows from them.

    Args:
        declaration: What is fused, and how.
        members: Its members, built.
        out_strides: The strides that maps are resampled to; None keeps the common ones.
        input_format: How the images that it takes were normalized. Members get their own.
        visits: A device that members visit one after another, coming from where they are; None where they stay.

    Attributes:
        levels: Channels, stride and sources of every common stride, fine to coarse.

    Raises:
        ValueError: Another number of members, or strides that cannot meet.
    """

    def __init__(
        self,
        declaration: Fusion,
        members: Sequence[Backbone],
        *,
        out_strides: Sequence[int] | None = None,
        input_format: InputFormat = SYMMETRIC,
        visits: torch.device | None = None,
    ):
        super().__init__()
        if len(members) != len(declaration.members):
            raise ValueError(f"{declaration.name} has {len(declaration.members)} members, got {len(members)}")
        own = [replace(m, backbone=b.declaration) for m, b in zip(declaration.members, members, strict=True)]
        self.declaration: Fusion = replace(declaration, members=tuple(own))
        self.members = nn.ModuleList(members)
        self.out_strides = tuple(out_strides) if out_strides else None
        self.input_format, self.visits = input_format, visits
        self.trainable = next((member.trainable for member in members if member.trainable), False)
        self.levels = fused_levels(self.declaration, self._pyramids())
        self.reducers = nn.ModuleDict(dict(self._reducers()))
        self.reducers.to(next(iter(members)).device)
        self._freeze_unread()
        self.eval()

    def _pyramids(self) -> list[list[OutMap]]:
        every: Any = self.members
        return [member.out_maps for member in every]

    def _freeze_unread(self) -> None:
        for i, member in enumerate(self.members):
            read = sorted({s.position for level in self.levels for s in level.sources if s.member == i})
            if len(read) < len(member.out_maps):  # type: ignore[arg-type]
                freeze_unread(member, read)  # type: ignore[arg-type]

    def _reducers(self) -> Iterator[tuple[str, nn.Module]]:
        name = self.declaration.name
        for level in self.levels:
            for source in level.sources:
                member = self.declaration.members[source.member]
                if member.components:
                    what = f"{name}: map {source.position} of {member.name}"
                    yield key_of(source), PrincipalComponents(source.channels, member.components, what)
            if level.components:
                what = f"{name}: stride {level.stride}"
                yield key_of(level), PrincipalComponents(level.width, level.components, what)

    # What it is.

    @property
    def out_maps(self) -> list[OutMap]:
        """Channels, stride and level of every map that a call returns."""
        return out_maps(self.levels, self.out_strides)  # type: ignore[arg-type]  # they have channels and a stride

    @property
    def module_names(self) -> list[str]:
        """The modules that each map is read from, joined by ``+``."""
        return ["+".join(names) for names in self._of_sources("module_names")]

    @property
    def activations(self) -> list[tuple[str, ...]]:
        """The activations that each map is made of, behind the names of their members."""
        return [
            tuple(f"{self.declaration.members[s.member].name}: {name}" for s in level.sources for name in names[s])
            for level, names in ((self.levels[m.level], self._names()) for m in self.out_maps)
        ]

    def _names(self) -> dict[Source, tuple[str, ...]]:
        every: Any = [member.activations for member in self.members]
        return {source: every[source.member][source.position] for level in self.levels for source in level.sources}

    def _of_sources(self, what: str) -> list[list[str]]:
        every = [getattr(member, what) for member in self.members]
        return [[every[s.member][s.position] for s in self.levels[m.level].sources] for m in self.out_maps]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.visits or self.members[0].device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its maps: that of its first member."""
        return self.members[0].dtype  # type: ignore[return-value]

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What the image encoder of its first member computes in."""
        return self.members[0].encoder_dtype  # type: ignore[return-value]

    @property
    def widest_map(self) -> float:
        """Values of the widest map that a member computes, for every pixel."""
        widest: Any = [member.widest_map for member in self.members]
        return max(float(w * f**2) for w, f in zip(widest, map(float, self.declaration.factors), strict=True))

    @property
    def configs(self) -> Mapping[str, Any]:
        """The configs of every member."""
        return {f"member{i}": member.configs for i, member in enumerate(self.members)}

    @property
    def options(self) -> dict[str, Any]:
        """How every member was built, and what it computes in."""
        return {f"member{i}": {**m.options, "dtype": str(m.dtype)} for i, m in enumerate(self.members)}  # type: ignore

    @property
    def provenance(self) -> dict[str, str]:  # type: ignore[override]
        """Where the weights of every member came from."""
        return {
            f"{i} {m.declaration.name}: {key}": value  # type: ignore[union-attr]
            for i, m in enumerate(self.members)
            for key, value in m.provenance.items()  # type: ignore[union-attr,operator]
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What ``timm.data.resolve_model_data_config`` reads."""
        return fusion_cfg(self.declaration, self.input_format)

    @property
    def size_divisibility(self) -> int:
        """A multiple of it needs no padding in any member whose pixels allow one. Any size is accepted."""
        sides = [m.size_divisibility / f for m, f in zip(self.members, self.declaration.factors, strict=True)]  # type: ignore
        return math.lcm(*(int(side) for side in sides if side == int(side)))

    # Cutting and training.

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Keep only some maps, and of each member what they need; one that they do not need is kept, and never run.
        Returns the positions that were kept.
        """
        out = self.out_maps
        kept = take(indices, len(out))
        levels = [self.levels[i] for i in sorted({out[i].level for i in kept})]
        reducers: dict[str, nn.Module] = {}
        members = []
        for i, (member, read) in enumerate(zip(self.members, self.declaration.members, strict=True)):
            order = [source.position for level in levels for source in level.sources if source.member == i]
            wanted = sorted(order)
            if wanted:
                member.prune_intermediate_layers(wanted)  # type: ignore[operator]
            found = {wanted.index(index): f"{i}_{index}" for index in wanted}
            reducers |= {f"{i}_{new}": self.reducers[old] for new, old in found.items() if old in self.reducers}
            maps = tuple(wanted.index(index) for index in order)
            members.append(replace(read, backbone=member.declaration, maps=maps))  # type: ignore[arg-type]
        strides = tuple(level.stride for level in levels)
        self.reducers = nn.ModuleDict(
            reducers | {f"stride{s}": self.reducers[f"stride{s}"] for s in strides if f"stride{s}" in self.reducers}
        )
        self.declaration = replace(self.declaration, members=tuple(members), strides=strides)
        self.levels = fused_levels(self.declaration, self._pyramids())
        self.out_strides = tuple(out[i].stride for i in kept) if self.out_strides else None
        self._freeze_unread()
        return kept

    def train(self, mode: bool = True) -> Any:
        """Only trainable members leave eval, whatever a framework calls."""
        super().train(mode and bool(self.trainable))
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in every member while it is trained."""
        for member in self.members:
            member.set_grad_checkpointing(enable)  # type: ignore[operator]

    def group_matcher(self, coarse: bool = False) -> Any:
        """For timm's layer-wise learning rates: parameter name -> depth in its member."""
        return self._depth

    def _depth(self, name: str) -> int:
        room, _, rest = name.partition(".")
        at, _, rest = rest.partition(".")
        member = self.members[int(at)] if room == "members" else None
        return int(member.group_matcher()(rest)) if isinstance(member, DiffusionBackbone) else 0

    def no_weight_decay(self) -> set[str]:
        """For timm's optimisers: the learned prompts of its members."""
        return {
            f"members.{i}.{name}"
            for i, member in enumerate(self.members)
            if isinstance(member, DiffusionBackbone)
            for name in member.no_weight_decay()
        }


def key_of(of: Source | FusedLevel) -> str:
    """The name of the principal components of a member's map or of a level."""
    return f"{of.member}_{of.position}" if isinstance(of, Source) else f"stride{of.stride}"
