"""The data model: what a checkpoint is, what a recipe reads from it, and who published it.

Everything here is plain frozen data without torch. A model is *declared* with these classes (see ``models/``); code
that needs to know something about a model reads it from here instead of comparing names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from diffusion_backbones.spec import activations
from diffusion_backbones.spec.checkpoint import Paper
from diffusion_backbones.spec.validation import check_fields, closest

NoiseRule = Literal["fixed", "random", "none"]
PromptPadding = Literal["max_length", "longest"]
Normalisation = Literal["none", "layer", "adaptive"]


@dataclass(frozen=True)
class Level:
    """Activations of one stride, concatenated along channels in the order given (forward order, as GDF does)."""

    activations: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.activations:
            raise ValueError("a level needs at least one activation id")
        for id in self.activations:
            activations.parse(id)


@dataclass(frozen=True)
class Recipe:
    """How to read a checkpoint.

    Args:
        name: Second half of a backbone's name (``gdf``).
        levels: The chosen activations, fine to coarse. Each level may be given as a :class:`Level`, one id, or a
            sequence of ids. A flat list of ids is grouped by stride with :meth:`from_ids`, once the network is known.
        timestep: What the network receives and the noise level is read at, ``-1`` to ``T - 1`` (T = 1000 for Stable
            Diffusion); -1 is "before the first step" and goes with ``noise="none"``. The default, 50, is GDF's nominal
            timestep.
        noise: ``"fixed"`` adds one seeded canvas, the same for every image; ``"random"`` draws anew in every call;
            ``"none"`` gives the network the clean latent.
        ensemble: Number of noise draws whose activations are averaged, at least 1.
        seed: Seed of the fixed canvas.
        prompt: Text for every image unless a call overrides it.
        prompt_padding: ``"max_length"`` pads to the tokenizer's limit, as diffusers' pipelines do; ``"longest"`` does
            not.
        scaled: Whether latents are multiplied by the encoder's scaling factor, as the denoiser was trained.
        without: Components that are left out, such as one of several text encoders.
        discard: Channels of every activation that are set to zero, after the noise draws are averaged.
        normalise: What is done to every activation then: ``"layer"`` is a LayerNorm over channels without parameters
            (epsilon 1e-6), ``"adaptive"`` also the shift and scale with which the block behind the activation modulates
            it.
        input_size: Side in pixels that the source used; ``None`` means the checkpoint's own.
        paper: Who chose it, or None for a recipe nobody published.
        nominal_timestep: The timestep as the source counts it, where that is another number.
        source: Where the settings were read.
        notes: What a user must know, one sentence each: differences from the source, conditions.
        unverified: What no source at hand confirms, one sentence each.

    Raises:
        ValueError: A value is outside what is stated here.
    """

    name: str
    levels: tuple[Level, ...]
    timestep: float = 50
    noise: NoiseRule = "fixed"
    ensemble: int = 1
    seed: int = 0
    prompt: str = ""
    prompt_padding: PromptPadding = "max_length"
    scaled: bool = True
    without: tuple[str, ...] = ()
    discard: tuple[int, ...] = ()
    normalise: Normalisation = "none"
    input_size: int | None = None
    paper: Paper | None = field(default=None)
    nominal_timestep: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.levels
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(
                f"recipe {self.name!r}: levels must be a non-empty sequence of activation ids or of levels, got "
                f"{given!r}"
            )
        object.__setattr__(self, "levels", tuple(_level(level) for level in given))
        for key in ("without", "discard", "notes", "unverified"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.noise not in get_args(NoiseRule):
            rules = get_args(NoiseRule)
            raise ValueError(
                f"recipe {self.name!r}: noise must be one of {', '.join(rules)}, got "
                f"{self.noise!r}.{closest(str(self.noise), rules)}"
            )
        if self.normalise not in get_args(Normalisation):
            known = get_args(Normalisation)
            raise ValueError(
                f"recipe {self.name!r}: normalise must be one of {', '.join(known)}, got "
                f"{self.normalise!r}.{closest(str(self.normalise), known)}"
            )
        if not all(isinstance(channel, int) and channel >= 0 for channel in self.discard):
            raise ValueError(f"recipe {self.name!r}: discard must be channels from 0 up, got {self.discard}")
        if self.prompt_padding not in get_args(PromptPadding):
            raise ValueError(
                f"recipe {self.name!r}: prompt_padding must be 'max_length' or 'longest', got {self.prompt_padding!r}"
            )
        if self.ensemble < 1 or (self.ensemble > 1 and self.noise == "none"):
            raise ValueError(
                f"recipe {self.name!r}: ensemble must be at least 1, and 1 without noise; got {self.ensemble} with "
                f"noise={self.noise!r}"
            )
        if not -1 <= self.timestep < 1000:
            raise ValueError(f"recipe {self.name!r}: timestep must be from -1 to 999, got {self.timestep}")
        if self.timestep < 0 and self.noise != "none":
            raise ValueError(
                f"recipe {self.name!r}: timestep {self.timestep} lies before the first step, where no noise level is "
                "defined; use noise='none'"
            )
        if not isinstance(self.prompt, str):
            raise ValueError(
                f"recipe {self.name!r}: prompt must be one string, got {type(self.prompt).__name__}; give a list per "
                "call instead"
            )

    @property
    def ids(self) -> tuple[str, ...]:
        """Every activation id, level by level."""
        return tuple(id for level in self.levels for id in level.activations)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change whenever a setting that changes the features does."""
        cosmetic = {"name", "paper", "nominal_timestep", "source", "notes", "unverified", "input_size"}
        usual = Recipe("", self.levels).to_dict()  # left out, so that a setting that is new one day changes no digest
        settings = {k: v for k, v in self.to_dict().items() if k not in cosmetic and (k == "levels" or v != usual[k])}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def override(self, **settings: Any) -> Recipe:
        """A copy with other settings; an unknown name is a ``TypeError`` with the closest match."""
        check_fields(Recipe, settings, f"recipe {self.name!r}")
        return replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form that :meth:`from_dict` reads back."""
        data = asdict(self) | {"levels": [list(level.activations) for level in self.levels]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; ``name`` may be missing.

        Raises:
            TypeError: An unknown setting, named with its closest match.
            ValueError: A value out of range, or no levels.
        """
        check_fields(cls, data, "a recipe")
        if "levels" not in data:
            raise ValueError("a recipe needs levels: a list of lists of activation ids, fine to coarse")
        paper = data.get("paper")
        return cls(**{"name": "custom", **data, "paper": Paper(**paper) if paper else None})

    def to_yaml(self, path: str | Path) -> None:
        """Write a file that ``create_model(checkpoint, recipe=path)`` accepts."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file.

        Raises:
            FileNotFoundError: Nothing is there.
            ValueError: It is not a mapping of recipe settings.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"recipe={str(path)!r} is no file; give a YAML or JSON file, a Recipe, or a list of activation ids"
            )
        try:
            data = yaml.safe_load(path.read_text())  # JSON is a subset of YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML or JSON file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} must hold a mapping with at least 'levels', got {type(data).__name__}")
        try:
            return cls.from_dict({"name": path.stem, **data})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


def _level(level: Level | str | Sequence[str]) -> Level:
    if isinstance(level, Level):
        return level
    return Level((level,) if isinstance(level, str) else tuple(level))
