"""Recipes: which activations are read from a checkpoint, and under which settings."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from diffusion_backbones.spec import activations, strict_yaml
from diffusion_backbones.spec.checkpoint import Paper
from diffusion_backbones.spec.validation import MOST, check_fields, convert, plain

NoiseRule = Literal["fixed", "random", "none"]
PromptPadding = Literal["max_length", "longest"]
Normalization = Literal["none", "layer", "adaptive"]
Timestep = Annotated[int, Meta(ge=-1, lt=1000)] | Annotated[float, Meta(ge=-1, lt=1000)]
"""An integer stays one, so that the digest of a recipe does not change."""
Count = Annotated[int, Meta(ge=1, le=MOST)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""What torch's generators take."""
Channel = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class Level:
    """Activations of one stride, concatenated along channels in the order given (forward order, as GDF does).

    Raises:
        ValueError: There is no activation, or one is not an activation id.
    """

    activations: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.activations:
            raise ValueError("a level needs at least one activation id")
        for activation_id in self.activations:
            activations.parse(activation_id)


@dataclass(frozen=True)
class Recipe:
    """How to read a checkpoint.

    Args:
        name: Second half of a backbone's name (``gdf``).
        levels: The chosen activations, fine to coarse. Each level may be given as a :class:`Level`, one id, or a
            sequence of ids: ``("a", "b")`` are two levels and ``(("a", "b"),)`` is one. Only ``create_model(checkpoint,
            recipe=["a", "b"])`` groups a flat list by stride, since that needs the network.
        timestep: The timestep that the network receives and that sets the noise level, -1 to 999; -1 is "before the
            first step" and goes with ``noise="none"``. The default, 50, is GDF's nominal timestep.
        noise: ``"fixed"`` adds one seeded canvas, the same for every image; ``"random"`` draws anew in every call;
            ``"none"`` gives the network the clean latent.
        ensemble: Number of noise draws whose activations are averaged, at least 1, and 1 without noise.
        seed: Seed of the fixed canvas.
        prompt: Text for every image unless a call overrides it.
        prompt_padding: ``"max_length"`` pads to the tokenizer's limit, as diffusers' pipelines do; ``"longest"`` does
            not.
        scaled: Whether latents are multiplied by the encoder's scaling factor, as the denoiser was trained.
        without: Components that are left out, such as one of several text encoders.
        discard: Channels of every activation that are set to zero, after the noise draws are averaged.
        normalize: What is done to every activation then: ``"layer"`` is a LayerNorm over channels without parameters
            (epsilon 1e-6), ``"adaptive"`` also the shift and scale with which the block behind the activation modulates
            it.
        input_size: Side in pixels that the source used; ``None`` means the checkpoint's own.
        paper: The publication that chose it, or None for an unpublished recipe.
        nominal_timestep: The timestep as the source counts it, where that is another number.
        source: Where the settings were read.
        notes: Differences from the source and conditions that a user must know, one sentence each.
        unverified: Facts that no source at hand confirms, one sentence each.

    The keyword and attribute ``normalise`` of version 0.1 still work, with a ``DeprecationWarning``. Files keep that
    spelling, and are read in both.

    Raises:
        ValueError: A value has another type or is outside what is stated here.
    """

    name: str
    levels: tuple[Level, ...]
    timestep: Timestep = 50
    noise: NoiseRule = "fixed"
    ensemble: Count = 1
    seed: Seed = 0
    prompt: str = ""
    prompt_padding: PromptPadding = "max_length"
    scaled: bool = True
    without: tuple[str, ...] = ()
    discard: tuple[Channel, ...] = ()
    normalize: Normalization = "none"
    input_size: Count | None = None
    paper: Paper | None = field(default=None)
    nominal_timestep: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"recipe {self.name!r}"
        settings = {name: plain(value) for name, value in vars(self).items()}
        settings["levels"] = _levels(self.levels, what)
        self.__dict__.update(msgspec.structs.asdict(convert(settings, _settings(), what)))
        if self.ensemble > 1 and self.noise == "none":
            raise ValueError(
                f"{what}: an ensemble of {self.ensemble} averages over noise, and there is none with noise='none'; use "
                "ensemble=1"
            )
        if self.timestep < 0 and self.noise != "none":
            raise ValueError(
                f"{what}: timestep {self.timestep} lies before the first step, where no noise level is defined; use "
                "noise='none'"
            )

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Also pickles of version 0.1."""
        self.__dict__.update(_american(state))

    @property
    def normalise(self) -> Normalization:
        """The old name of ``normalize``."""
        _warn(stacklevel=3)
        return self.normalize

    @property
    def ids(self) -> tuple[str, ...]:
        """Every activation id, level by level."""
        return tuple(name for level in self.levels for name in level.activations)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change whenever a setting that changes the features does."""
        cosmetic = {"name", "paper", "nominal_timestep", "source", "notes", "unverified", "input_size"}
        usual = Recipe("", self.levels).to_dict()  # left out, so that a setting that is new one day changes no digest
        settings = {k: v for k, v in self.to_dict().items() if k not in cosmetic and (k == "levels" or v != usual[k])}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def override(self, **settings: Any) -> Recipe:
        """A copy with other settings.

        Raises:
            TypeError: An unknown setting; the closest is named.
            ValueError: As for a new recipe.
        """
        if "normalise" in settings:
            _warn(stacklevel=3)
        settings = _american(settings)
        check_fields(Recipe, settings, f"recipe {self.name!r}")
        return replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form that :meth:`from_dict` reads back."""
        data = asdict(self) | {"levels": [list(level.activations) for level in self.levels]}
        return {ON_DISK.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; ``name`` may be missing.

        Raises:
            TypeError: An unknown setting; the closest is named.
            ValueError: A value of another type or out of range, or no levels; the error gives its path.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a recipe is a mapping of its settings, got {type(data).__name__}")
        if "normalise" in data and "normalize" in data:
            raise ValueError("recipe: normalise and normalize are two spellings of one setting; give one")
        data = _american(data)
        check_fields(cls, data, "recipe")
        if "levels" not in data:
            raise ValueError("recipe: it needs levels, a list of lists of activation ids, fine to coarse")
        return cls(**{"name": "custom", **data})

    def to_yaml(self, path: str | Path) -> None:
        """Write a file that ``create_model(checkpoint, recipe=path)`` accepts."""
        import yaml  # slower to import than this package

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: An unknown setting; the closest is named.
            ValueError: The file does not hold a mapping of recipe settings, one of them does not fit or is given twice,
                or a number is written in octal.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"recipe={str(path)!r} is not a file; give a YAML or JSON file, a Recipe, or a list of activation ids"
            )
        try:
            data = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))  # JSON is a subset of YAML
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a YAML or JSON file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} must hold a mapping with at least 'levels', got {type(data).__name__}")
        try:
            return cls.from_dict({"name": path.stem, **data})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


@functools.cache
def _settings() -> type[msgspec.Struct]:
    """The settings of a recipe, each with its type and range, as msgspec checks them all at once."""
    return msgspec.defstruct("Settings", list(get_type_hints(Recipe, include_extras=True).items()))


def _levels(given: Any, what: str) -> tuple[Level, ...]:
    """The levels of a recipe as it was given them."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"{what}: levels must be a non-empty sequence of activation ids or of levels, got {given!r}")
    return tuple(_level(level, f"{what}: levels[{i}]") for i, level in enumerate(given))


def _level(given: Any, what: str) -> Level:
    if isinstance(given, Level):
        return given
    ids = convert([given] if isinstance(given, str) else given, tuple[str, ...], what)
    try:
        return Level(ids)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


# The setting ``normalize`` was called ``normalise`` in version 0.1, and still is in files, so that digests and saved
# folders stay as they are.

ON_DISK = {"normalize": "normalise"}


def _american(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names of today; the old name wins, because ``dataclasses.replace`` adds the new one."""
    renamed = dict(settings)
    if "normalise" in renamed:
        renamed["normalize"] = renamed.pop("normalise")
    return renamed


def _warn(stacklevel: int) -> None:
    message = "Recipe.normalise is called normalize now; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


_init = Recipe.__init__


@functools.wraps(_init)
def _init_with_old_name(self: Recipe, *args: Any, **settings: Any) -> None:
    if "normalise" in settings:
        _warn(stacklevel=3)
        settings = _american(settings)
    _init(self, *args, **settings)


Recipe.__init__ = _init_with_old_name  # type: ignore[method-assign]
