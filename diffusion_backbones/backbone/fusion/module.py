"""The fusion: an image in, one pyramid of several backbones out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_backbones.backbone import save_pretrained
from diffusion_backbones.backbone.call_arguments import check_image
from diffusion_backbones.backbone.fusion import saving
from diffusion_backbones.backbone.fusion.state import FusionState, key_of
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops import fusing, pyramid
from diffusion_backbones.ops.principal_components import Moments
from diffusion_backbones.spec.fused_levels import FusedLevel
from diffusion_backbones.spec.fusion import CONFIDENCE, check_weights
from diffusion_backbones.spec.levels import take
from diffusion_backbones.spec.validation import as_integer, closest

_VISIT = threading.RLock()
"""One member at a time is on the device that members visit."""


class Given(NamedTuple):
    """What a call reads: images, or what :meth:`FusedBackbone.encode` gave.

    Attributes:
        size: Height and width in pixels of the fusion's image.
        x: (B, 3, H, W), or None.
        latents: One tensor for each member, or None.
    """

    size: tuple[int, int]
    x: Tensor | None = None
    latents: Sequence[Tensor] | None = None


class FusedBackbone(FusionState):
    """Several backbones read as one pyramid. Made by :func:`~diffusion_backbones.fuse` or by name.

    Every method that runs it takes the keywords of a call of :class:`DiffusionBackbone`; each of its diffusion
    backbones gets them. ``members={"sd15_gdf": {"prompt": "a cat"}}`` gives some to one member, by name or position.

    See :class:`~diffusion_backbones.backbone.fusion.state.FusionState` for its attributes.
    """

    def forward(
        self,
        x: Tensor | None = None,
        indices: int | Sequence[int] | None = None,
        *,
        latents: Sequence[Tensor] | None = None,
        weights: Sequence[float] | str | None = None,
        against: Tensor | None = None,
        members: Mapping[int | str, Mapping[str, Any]] | None = None,
        **call: Any,
    ) -> list[Tensor]:
        """An image batch -> its pyramid.

        Args:
            x: (B, 3, H, W) floating point in [-1, 1], or as ``input_format`` says; any H and W.
            indices: Which maps, by position; an integer n means the last n. All by default.
            latents: What :meth:`encode` gave, in place of the images.
            weights: In place of the fusion's own: a number for each member, or ``"confidence"``.
            against: For ``"confidence"``: the images (B or 1, 3, H', W') that positions of ``x`` are sought in.
            members: Keywords for single members.
            **call: Keywords for every diffusion backbone.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), fine to coarse.

        Raises:
            TypeError: Both images and latents, or neither; an unknown keyword.
            ValueError: They are not what they must be; principal components that are not fitted; or weights of another
                number.
        """
        chosen, calls = take(indices, len(self.out_maps)), self._calls(call, members)
        numbers, compared = self._weights(weights, against)
        if (x is None) == (latents is None):
            raise TypeError("give either images x or latents=")
        given = self._images(x) if x is not None else self._latents(latents, None)
        wanted = sorted({self.out_maps[i].level for i in chosen})
        self._check_fitted(wanted)
        native = self._native(given, wanted, calls, numbers)
        if compared:
            assert against is not None
            other = self._native(self._images(against), wanted, calls, numbers)
            native = {i: self._confident(self.levels[i], native[i], other.pop(i)) for i in wanted}
        return self._leaving(native, chosen, given.size)

    def forward_latents(
        self,
        z: Sequence[Tensor],
        size: tuple[int, int] | None = None,
        indices: int | Sequence[int] | None = None,
        **call: Any,
    ) -> list[Tensor]:
        """What :meth:`encode` gave -> the pyramid.

        Args:
            z: One tensor for each member.
            size: Height and width in pixels of the fusion's image; by default all that a member of that size has.
            indices, **call: As in :meth:`forward`.
        """
        members, weights = call.pop("members", None), call.pop("weights", None)
        chosen, calls = take(indices, len(self.out_maps)), self._calls(call, members)
        numbers, _ = self._weights(weights, None)
        given, wanted = self._latents(z, size), sorted({self.out_maps[i].level for i in chosen})
        self._check_fitted(wanted)
        return self._leaving(self._native(given, wanted, calls, numbers), chosen, given.size)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images -> what each member starts from: latents, or of timm's the images at their size and normalization."""
        given, out = self._images(x), []
        for i, member in enumerate(self.members):
            with self._visit(member):
                out.append(member.encode(self._seen(i, given)))  # type: ignore[operator]
        return out

    @torch.no_grad()
    def fit(self, images: Tensor | Iterable[Tensor], **call: Any) -> FusedBackbone:
        """Fit the principal components that the fusion has on images, together; they are saved with it.

        Args:
            images: A batch, or several, as :meth:`forward` takes them; sizes may differ.
            **call: As in :meth:`forward`.

        Raises:
            ValueError: There is nothing to fit, or too few positions.
        """
        if not self.reducers:
            raise ValueError(f"{self.declaration.name} has no components to fit; fuse with components=")
        batches = [images] if isinstance(images, Tensor) else list(images)
        calls, every = self._calls(call, call.pop("members", None)), range(len(self.levels))
        moments = {key: Moments(reducer.mean.numel()) for key, reducer in self.reducers.items()}  # type: ignore
        for batch in batches:
            given = self._images(batch)
            for i, member in enumerate(self.members):
                sources = [s for level in self.levels for s in level.sources if s.member == i and key_of(s) in moments]
                if sources:
                    with self._visit(member):
                        maps = self._read(i, given, [s.position for s in sources], calls[i])
                    for source, m in zip(sources, maps, strict=True):
                        moments[key_of(source)].add(m)
        self._fit(moments, [key_of(s) for level in self.levels for s in level.sources])
        behind = [key_of(level) for level in self.levels if level.components]
        for batch in batches if behind else []:
            for i, m in self._native(self._images(batch), every, calls, self._numbers, reduced=False).items():
                moments[key_of(self.levels[i])].add(m)
        self._fit(moments, behind)
        return self

    def _fit(self, moments: Mapping[str, Moments], keys: Iterable[str]) -> None:
        for key in keys:
            if key in moments:
                self.reducers[key].fit(moments[key])  # type: ignore[operator]

    @property
    def _numbers(self) -> tuple[float, ...]:
        weights = self.declaration.weights
        return (1.0,) * len(self.members) if isinstance(weights, str) or not weights else weights

    def _weights(self, weights: Any, against: Any) -> tuple[tuple[float, ...], bool]:
        """A number for each member, and whether positions are weighted by confidence."""
        own = self.declaration.weights
        chosen = own if weights is None else check_weights(weights, len(self.members), self.declaration.name)
        compared = chosen == CONFIDENCE
        if compared != (against is not None):
            told = "needs the images that positions are sought in: give against=" if compared else "takes no against="
            raise ValueError(
                f"{self.declaration.name} with weights={chosen!r} {told}"
                + ("; the image that is searched has weights=(1, ...)" if compared else "")
            )
        if compared:
            self.declaration.check_comparable()
            return (1.0,) * len(self.members), True
        return (self._numbers if weights is None else tuple(chosen) or self._numbers), False  # type: ignore

    def _calls(self, call: Mapping[str, Any], members: Any) -> list[dict[str, Any]]:
        """The keywords of each member.

        Raises:
            KeyError: No such member, or several.
            TypeError: There is no diffusion backbone to take them.
        """
        given = {key: value for key, value in call.items() if value is not None}
        diffusion = [isinstance(member, DiffusionBackbone) for member in self.members]
        if given and not any(diffusion):
            raise TypeError(f"no member of {self.declaration.name} takes {', '.join(given)}")
        calls = [dict(given) if takes else {} for takes in diffusion]
        names = [member.name for member in self.declaration.members]
        for key, single in dict(members or {}).items():
            at = as_integer(key)
            found = names.index(key) if key in names else at if at is not None else -1
            if not 0 <= found < len(names):
                raise KeyError(
                    f"{self.declaration.name} has no member {key!r}.{closest(str(key), names)} It has "
                    f"{', '.join(names)}."
                )
            if names.count(key) > 1:
                places = [i for i, name in enumerate(names) if name == key]
                raise KeyError(f"{self.declaration.name} has {key!r} at positions {places}; give one of these")
            if not diffusion[found]:
                raise TypeError(f"{names[found]} is no diffusion backbone and takes no {', '.join(single)}")
            calls[found] |= single
        return calls

    def _images(self, x: Any) -> Given:
        check_image(x, self.input_format, self.dtype)
        return Given((x.shape[-2], x.shape[-1]), x)

    def _latents(self, z: Any, size: Any) -> Given:
        """Latents that a caller brings, checked as far as the members do not.

        Raises:
            ValueError: They are for another number of members, or ``size`` cannot be.
        """
        n = len(self.members)
        if not isinstance(z, Sequence) or len(z) != n or not all(isinstance(part, Tensor) for part in z):
            got = f"{len(z)} of them" if isinstance(z, Sequence) else type(z).__name__
            raise ValueError(
                f"latents of {self.declaration.name} are a list of {n} tensors, one for each member, as encode() gives "
                f"them; got {got}"
            )
        if len({len(part) for part in z}) > 1:
            raise ValueError(f"latents must be of one batch for every member, got {[len(part) for part in z]}")
        if size is None:
            largest = self.declaration.factors.index(Fraction(1))
            stride = getattr(self.members[largest], "latent_stride", 1)
            size = tuple(side * stride for side in z[largest].shape[-2:])
        sides = [as_integer(side) for side in size] if isinstance(size, Sequence) else []
        if len(sides) != 2 or not all(side and side > 0 for side in sides):
            raise ValueError(f"size must be height and width in pixels, two integers, got {size!r}")
        return Given((int(size[0]), int(size[1])), None, z)

    def _seen(self, i: int, given: Given) -> Tensor:
        """The images as a member takes them."""
        assert given.x is not None
        size = fusing.scaled(given.size, self.declaration.factors[i])
        wanted: Any = self.members[i].input_format
        return fusing.reformat(fusing.resized(given.x, size, self.input_format), self.input_format, wanted)

    def _read(self, i: int, given: Given, indices: Sequence[int], call: Mapping[str, Any]) -> list[Tensor]:
        """Some maps of a member, as it gives them alone."""
        member: Any = self.members[i]
        if given.latents is None:
            maps: list[Tensor] = member(self._seen(i, given), indices, **call)
            return maps
        size = fusing.scaled(given.size, self.declaration.factors[i])
        read: list[Tensor] = member.forward_latents(given.latents[i], size, indices, **call)
        return read

    def _native(
        self,
        given: Given,
        wanted: Sequence[int],
        calls: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
        reduced: bool = True,
    ) -> dict[int, Tensor]:
        """Some levels, by position; ``reduced`` to their components at last. Members run one after another, and what
        one gave is in its place before the next begins.
        """
        sizes = {i: tuple(-(-side // self.levels[i].stride) for side in given.size) for i in wanted}
        out = {i: fusing.Assembly(self.levels[i].width, sizes[i], self.device, self.dtype) for i in wanted}  # type: ignore
        for at, member in enumerate(self.members):
            sources = {i: [s for s, _ in self.levels[i].of(at)] for i in wanted}
            indices = sorted({s.position for of_level in sources.values() for s in of_level})
            if not indices:
                continue
            with self._visit(member):
                maps = dict(zip(indices, self._read(at, given, indices, calls[at]), strict=True))
            for i, of_level in sources.items():
                if of_level:
                    each = (self._reduce(key_of(s), maps.pop(s.position)) for s in of_level)
                    out[i].add(each, self.declaration.normalize == "l2", weights[at])
        levels = {i: out.pop(i).take() for i in wanted}
        return {i: self._reduce(key_of(self.levels[i]), m) if reduced else m for i, m in levels.items()}

    def _reduce(self, key: str, m: Tensor) -> Tensor:
        if key not in self.reducers:
            return m
        reducer: Any = self.reducers[key]
        reduced: Tensor = reducer(m.to(reducer.mean.device)).to(m.device)
        return reduced

    def _confident(self, level: FusedLevel, m: Tensor, other: Tensor) -> Tensor:
        spans = [(pairs[0][1].start, pairs[-1][1].stop) for pairs in map(level.of, level.members)]
        parts, keys = ([t[:, a:b] for a, b in spans] for t in (m, other))
        weights = fusing.confidence(parts, keys).to(m.dtype)
        return torch.cat([part * weights[:, i : i + 1] for i, part in enumerate(parts)], 1)

    def _leaving(self, native: Mapping[int, Tensor], chosen: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
        out = [self.out_maps[i] for i in chosen]
        return [pyramid.resample(native[m.level], self.levels[m.level].stride, m.stride, size) for m in out]

    def _check_fitted(self, wanted: Iterable[int]) -> None:
        for level in (self.levels[i] for i in wanted):
            for key in (*map(key_of, level.sources), key_of(level)):
                if key in self.reducers and not self.reducers[key].is_fitted:
                    raise ValueError(
                        f"{self.reducers[key].what} is reduced to principal components, which are not fitted yet; call "
                        "fit(images) with some of your images, or load a fusion that was saved with them"
                    )

    @contextmanager
    def _visit(self, member: Any) -> Iterator[None]:
        """Within the ``with`` block a member is where it computes."""
        if self.visits is None:
            yield
            return
        with _VISIT:  # before its device is asked for: another call may have brought it there, and take it away
            home = member.device
            member.to(self.visits)
            try:
                yield
            finally:
                member.to(home)

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
        """Write the fusion: a folder for every diffusion backbone, what timm's members and the principal components
        hold, and the card. ``create_model("local-dir:FOLDER")`` reads it back. Returns the folder.

        Raises:
            ValueError, FileExistsError, OSError: As for :meth:`DiffusionBackbone.save_pretrained`.
        """
        return saving.save(self, folder, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload fusion",
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """:meth:`save_pretrained` into a hub repository; as :meth:`DiffusionBackbone.push_to_hub`. Every member's
        weights keep their licence.
        """
        return save_pretrained.push(
            self,
            repo_id,
            private=private,
            commit_message=commit_message,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
        )

    from_pretrained = staticmethod(DiffusionBackbone.from_pretrained)
