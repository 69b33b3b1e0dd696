"""A fusion: several backbones read together as one pyramid. What it is, without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from diffusion_backbones.spec.checkpoint import Checkpoint, License, Paper
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.validation import MOST, as_integer, check_fields, convert, plain

Normalization = Literal["none", "l2"]
CONFIDENCE = "confidence"
"""In place of numbers: weights that each position has by how clearly it is found in another image."""
_UNKNOWN = License("other", name="unknown; see where timm has the weights from", verified=False)


@dataclass(frozen=True)
class TimmModel:
    """A feature extractor of timm.

    Args:
        name: timm's, with or without a tag: ``vit_base_patch14_dinov2.lvd142m``.
        license: Licence of its weights.
        input_size: Side in pixels of the images that it was made for; None for what timm says.
        out_indices: timm's, of its maps; empty for the deepest map of every stride.
        title: Name for people.
        paper: The publication that introduced it.
    """

    name: str
    license: License = _UNKNOWN
    input_size: int | None = None
    out_indices: tuple[int, ...] = ()
    title: str = ""
    paper: Paper | None = None

    @property
    def checkpoint_name(self) -> str:
        """What names its weights."""
        return self.name

    @property
    def digest(self) -> str:
        """Names what is read of it."""
        return f"{self.name} {list(self.out_indices)}"


@dataclass(frozen=True)
class Member:
    """One backbone of a fusion, and how the fusion reads it.

    Args:
        backbone: A declared backbone, or a feature extractor of timm.
        input_size: The fusion's image of its own ``input_size`` is resized to this side for the member, and any other
            image by the same factor; None for the size that the backbone was made for.
        maps: Positions in the member's pyramid, in the order in which the fusion concatenates them; None for all, fine
            to coarse, and none where it is not read.
        components: How many principal components each of these maps is reduced to, before anything else is done to it;
            None keeps it as it is.

    Raises:
        ValueError: A number is not one from 1 up, or a map is named twice.
    """

    backbone: Declaration | TimmModel
    input_size: int | None = None
    maps: tuple[int, ...] | None = None
    components: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("input_size", self.input_size), ("components", self.components)):
            _check_count(f"member {self.name!r}: {what}", value)
        if self.maps is not None and len(set(self.maps)) < len(self.maps):
            raise ValueError(f"member {self.name!r}: maps must be different positions, got {self.maps}")

    @property
    def name(self) -> str:
        """Of its backbone."""
        return self.backbone.name

    @property
    def size(self) -> int | None:
        """Side in pixels of its input; None where only timm knows."""
        return self.input_size or self.backbone.input_size


@dataclass(frozen=True)
class Fusion:
    """Several backbones read as one. Every member sees the image at its own size, its maps are brought to the nearest
    of common strides, and those of one stride are concatenated, member by member.

    Args:
        name: What ``create_model`` takes.
        members: At least two.
        strides: The common strides, fine to coarse, in pixels of the fusion's image; empty for those of the first
            member whose strides are whole pixels there.
        normalize: ``"l2"`` divides what a member gives at a position of one stride by its length, over all channels.
        weights: What each member is multiplied by then, or ``"confidence"``; empty for 1 each.
        components: How many principal components each stride is reduced to at last; None keeps it as it is.
        title, paper, source, notes, unverified: As of a :class:`~diffusion_backbones.Recipe`.

    Raises:
        ValueError: Something has a value that cannot be.
    """

    name: str
    members: tuple[Member, ...]
    strides: tuple[int, ...] = ()
    normalize: Normalization = "l2"
    weights: tuple[float, ...] | str = ()
    components: int | None = None
    title: str = ""
    paper: Paper | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"fusion {self.name!r}"
        if len(self.members) < 2:
            raise ValueError(f"{what}: a fusion has at least two members, got {len(self.members)}")
        if self.normalize not in get_args(Normalization):
            raise ValueError(f"{what}: normalize must be 'none' or 'l2', got {self.normalize!r}")
        self.__dict__["weights"] = check_weights(self.weights, len(self.members), what)
        self.__dict__["strides"] = _check_strides(self.strides, what)
        _check_count(f"{what}: components", self.components)
        if self.weights == CONFIDENCE:
            self.check_comparable()

    def check_comparable(self) -> None:
        """Check that its members can be weighted by confidence.

        Raises:
            ValueError: Their vectors have no common length, or are mixed with those of others behind it.
        """
        if self.normalize != "l2" or self.components:
            raise ValueError(
                f"fusion {self.name!r}: weights='confidence' compare directions in two images, so they go with "
                "normalize='l2', and with no components behind them; a member may have components"
            )

    @property
    def architecture(self) -> str:
        """The name: a fusion has no tags."""
        return self.name

    tag = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side in pixels of each member's input."""
        unknown = [member.name for member in self.members if member.size is None]
        if unknown:
            raise ValueError(f"fusion {self.name!r}: the input size of {unknown[0]} is known once it is built")
        return tuple(member.size for member in self.members if member.size is not None)

    @property
    def input_size(self) -> int:
        """Side in pixels of the fusion's own image: the largest of its members."""
        return max(self.sizes)

    @property
    def factors(self) -> tuple[Fraction, ...]:
        """What the sides of an image are multiplied by for each member, at most 1."""
        return tuple(Fraction(size, self.input_size) for size in self.sizes)

    @property
    def papers(self) -> list[Paper]:
        """What to cite, each once: the fusion, and what it reads."""
        found = [self.paper]
        for member in self.members:
            backbone = member.backbone
            if isinstance(backbone, Declaration):
                found += [backbone.recipe.paper, backbone.checkpoint.paper]
            else:
                found.append(backbone.paper)
        return list(dict.fromkeys(paper for paper in found if paper))

    @property
    def licenses(self) -> dict[str, License]:
        """The licence of every member's weights, by what names them."""
        return {m.backbone.checkpoint_name: m.backbone.license for m in self.members}

    @property
    def prompt(self) -> str:
        """The prompts of its diffusion backbones."""
        return " + ".join(d.prompt for d in self.diffusion)

    @property
    def timestep(self) -> float:
        """Of its first diffusion backbone; -1 if there is none."""
        return next((d.timestep for d in self.diffusion), -1)

    @property
    def diffusion(self) -> list[Declaration]:
        """Those of its members that are diffusion backbones."""
        return [m.backbone for m in self.members if isinstance(m.backbone, Declaration)]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change whenever a setting that changes the features does."""
        read = [[m.backbone.digest, m.backbone.checkpoint_name, m.size, m.maps, m.components] for m in self.members]
        settings = [read, self.strides, self.normalize, self.weights, self.components]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def described(self) -> dict[str, Any]:
        """JSON-able form that :meth:`from_dict` reads back."""
        members = []
        for member in self.members:
            backbone = member.backbone
            kept = {"input_size": member.input_size, "maps": member.maps, "components": member.components}
            if isinstance(backbone, Declaration):
                parts = {"checkpoint": asdict(backbone.checkpoint), "recipe": backbone.recipe.to_dict()}
                members.append({"name": backbone.name, **parts, **kept})
            else:
                members.append({"timm": asdict(backbone), **kept})
        rest = {key: value for key, value in vars(self).items() if key not in ("members", "paper")}
        found: dict[str, Any] = json.loads(
            json.dumps({**rest, "paper": asdict(self.paper) if self.paper else None, "members": members})
        )
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fusion:
        """Inverse of :meth:`described`.

        Raises:
            KeyError: Something is missing.
            TypeError: A key is unknown.
            ValueError: A value has another type or cannot be.
        """
        check_fields(cls, {key: None for key in data}, "fusion")
        weights = data["weights"]
        return cls(
            name=data["name"],
            members=tuple(_member(member) for member in data["members"]),
            strides=tuple(data["strides"]),
            normalize=data["normalize"],
            weights=weights if isinstance(weights, str) else tuple(weights),
            components=data["components"],
            title=data["title"],
            paper=data["paper"] and convert(data["paper"], Paper, "fusion: paper"),
            source=data["source"],
            notes=tuple(data["notes"]),
            unverified=tuple(data["unverified"]),
        )

    def override(self, **settings: Any) -> Fusion:
        """A copy with other settings; what is None stays."""
        return replace(self, **{key: value for key, value in settings.items() if value is not None})


def _member(data: Mapping[str, Any]) -> Member:
    maps = None if data["maps"] is None else tuple(data["maps"])
    if "timm" in data:
        backbone: Declaration | TimmModel = convert(data["timm"], TimmModel, "member")
    else:
        backbone = Declaration(data["name"], Checkpoint.from_dict(data["checkpoint"]), Recipe.from_dict(data["recipe"]))
    return Member(backbone, data["input_size"], maps, data["components"])


def check_weights(weights: Any, members: int, what: str) -> tuple[float, ...] | str:
    """Weights as numbers, one for each member, or ``"confidence"``.

    Raises:
        ValueError: There are others, or another number of them.
    """
    if isinstance(weights, str) and weights == CONFIDENCE:
        return weights
    given = list(map(plain, weights)) if isinstance(weights, Sequence) and not isinstance(weights, str) else None
    numbers = given is not None and all(_is_weight(weight) for weight in given)
    if given is None or not numbers or len(given) not in (0, members):
        raise ValueError(
            f"{what}: weights must be {members} positive numbers, one for each member, or 'confidence', got {weights!r}"
        )
    return tuple(given)


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < math.inf


def _check_strides(strides: Any, what: str) -> tuple[int, ...]:
    given = list(strides) if isinstance(strides, Sequence) and not isinstance(strides, str) else [None]
    whole = [s for s in map(as_integer, given) if s is not None and 1 <= s <= MOST]
    if len(whole) < len(given) or whole != sorted(set(whole)):
        raise ValueError(f"{what}: strides must be growing positive integers such as (8, 16, 32), got {strides!r}")
    return tuple(whole)


def _check_count(what: str, value: Any) -> None:
    if value is not None and not 1 <= (as_integer(value) or 0) <= MOST:
        raise ValueError(f"{what} must be an integer from 1 to {MOST}, got {value!r}")


def fusion_cfg(fusion: Fusion, input_format: InputFormat = SYMMETRIC) -> dict[str, Any]:
    """The keys that ``timm.data.resolve_model_data_config`` and timm's hub code read."""
    size = fusion.input_size
    return {
        "architecture": fusion.name,
        "tag": "",
        "hf_hub_id": None,
        "custom_load": True,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": input_format.mean,
        "std": input_format.std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": None,
        "classifier": None,
        "license": "; ".join(dict.fromkeys(map(str, fusion.licenses.values()))),
        "origin_url": None,
        "paper_ids": [f"arXiv:{paper.arxiv}" for paper in fusion.papers if paper.arxiv],
    }
