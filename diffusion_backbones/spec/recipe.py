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
from diffusion_backbones.spec.concepts import check_classes
from diffusion_backbones.spec.discard import Discard, as_data, by_activation, channels_of, parse
from diffusion_backbones.spec.validation import MOST, check_fields, convert, plain

NoiseRule = Literal["fixed", "random", "none", "inversion"]
PromptPadding = Literal["max_length", "longest"]
Normalization = Literal["none", "layer", "adaptive", "l2"]
Combination = Literal["mean", "concatenate"]
Timestep = Annotated[int, Meta(ge=-1, lt=1000)] | Annotated[float, Meta(ge=-1, lt=1000)]
"""An integer stays one, so that the digest of a recipe does not change."""
INVERSION_STEPS = 50
Count = Annotated[int, Meta(ge=1, le=MOST)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""What torch's generators take."""


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
            ``"none"`` gives the network the clean latent; ``"inversion"`` has the whole network find the noise that
            leads to the image.
        ensemble: Number of noise draws whose activations are averaged, at least 1, and 1 without noise.
        seed: Seed of the fixed canvas.
        prompt: Text for every image unless a call overrides it.
        prompt_padding: ``"max_length"`` pads to the tokenizer's limit, as diffusers' pipelines do; ``"longest"`` does
            not.
        scaled: Whether latents are multiplied by the encoder's scaling factor, as the denoiser was trained.
        without: Components that are left out, such as one of several text encoders.
        discard: Channels of every activation that are set to zero, after the noise draws are averaged; or a mapping of
            activation ids to the channels of each; or ``"auto"`` for those that are massive, which are found when the
            backbone is built with weights and are its ``discard`` then (:mod:`diffusion_backbones.spec.discard`).
        normalize: What is done to every activation then: ``"layer"`` is a LayerNorm over channels without parameters
            (epsilon 1e-6), ``"adaptive"`` also the shift and scale with which the block behind the activation modulates
            it; ``"l2"`` divides what it has at a place by its length.
        input_size: Side in pixels that the source used; ``None`` means the checkpoint's own.
        paper: The publication that chose it, or None for an unpublished recipe.
        nominal_timestep: The timestep as the source counts it, where that is another number.
        source: Where the settings were read.
        notes: Differences from the source and conditions that a user must know, one sentence each.
        unverified: Facts that no source at hand confirms, one sentence each.
        timesteps: Several timesteps, in place of one: the image is encoded once, the network runs once for each of them
            on the same noise draws, and what it gives is combined. ``timestep`` is their first, and need not be given.
        combine: How activations of several timesteps become one, once each is post-processed: their ``"mean"``, or
            ``"concatenate"`` along channels in the order of ``timesteps``. Those of the image encoder have none. Of one
            timestep it is the mean.
        inversion_steps: Steps of an inversion over the whole schedule, of which those up to the last timestep are made,
            as diffusers' ``DDIMInverseScheduler`` spaces them.
        classes: Names that stand one by one in place of the ``{}`` of the prompt. The text then has one token for each
            of them, the last of its prompt, as CLIP embeds a text; maps of attention to the text are maps of classes.
        debias: How many directions of position are taken out of every level, which has the length 1 at every place then
            (:mod:`diffusion_backbones.ops.positional_basis`); 0 for none. They are found when the backbone is built
            with weights.
        components: How many principal components every level is reduced to at last; None keeps its channels. They are
            fitted on images, by :meth:`DiffusionBackbone.fit`.

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
    discard: Discard = ()
    normalize: Normalization = "none"
    input_size: Count | None = None
    paper: Paper | None = field(default=None)
    nominal_timestep: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    timesteps: tuple[Timestep, ...] = ()
    combine: Combination = "mean"
    inversion_steps: Count = INVERSION_STEPS
    classes: tuple[str, ...] = ()
    debias: Annotated[int, Meta(ge=0, le=MOST)] = 0
    components: Count | None = None

    def __post_init__(self) -> None:
        what = f"recipe {self.name!r}"
        settings = {name: plain(value) for name, value in vars(self).items()}
        settings["levels"] = _levels(self.levels, what)
        settings["timesteps"] = _plain_items(self.timesteps)
        dropped = parse(settings.pop("discard"), what)
        self.__dict__.update(msgspec.structs.asdict(convert(settings, _settings(), what)) | {"discard": dropped})
        if unknown := [name for name in by_activation(dropped) if name not in self.ids]:
            raise ValueError(
                f"{what}: discard names {unknown[0]!r}, which the recipe does not read; it reads {', '.join(self.ids)}"
            )
        if self.ensemble > 1 and self.noise in ("none", "inversion"):
            raise ValueError(
                f"{what}: an ensemble of {self.ensemble} averages over noise that is drawn, and none is with "
                f"noise={self.noise!r}; use ensemble=1"
            )
        if (first := min(self.all_timesteps)) < 0 and self.noise != "none":
            raise ValueError(
                f"{what}: timestep {first} lies before the first step, where no noise level is defined; use "
                "noise='none'"
            )
        self._check_timesteps(what)
        check_classes(self.classes, self.prompt, what)

    def _check_timesteps(self, what: str) -> None:
        if self.timesteps and self.timestep != self.timesteps[0]:
            raise ValueError(
                f"{what}: timestep={self.timestep} is not the first of timesteps={self.timesteps}; give one of the two"
            )
        if len(set(self.timesteps)) < len(self.timesteps):
            raise ValueError(f"{what}: timesteps must differ from each other, got {self.timesteps}")
        if len(self.timesteps) == 1:  # the same as timestep alone, and so with the same digest
            self.__dict__["timesteps"] = ()
        if not self.timesteps:
            self.__dict__["combine"] = "mean"
        if self.inversion_steps != INVERSION_STEPS and self.noise != "inversion":
            raise ValueError(
                f"{what}: inversion_steps={self.inversion_steps} is for noise='inversion', and noise={self.noise!r}"
            )

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Also pickles of version 0.1."""
        later = {key: value for group in _LATER for key, value in group.items()}
        self.__dict__.update(later | _american(state))

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
    def all_timesteps(self) -> tuple[Timestep, ...]:
        """``timesteps``, or the one ``timestep``: never empty."""
        return self.timesteps or (self.timestep,)

    @property
    def concatenated(self) -> int:
        """How many timesteps each channel of the denoiser is there for: 1 unless they are concatenated."""
        return len(self.all_timesteps) if self.combine == "concatenate" else 1

    def discarded(self, activation_id: str) -> tuple[int, ...]:
        """The channels of an activation that are set to zero, as far as they are known."""
        return channels_of(self.discard, activation_id)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change whenever a setting that changes the features does."""
        cosmetic = {"name", "paper", "nominal_timestep", "source", "notes", "unverified", "input_size"}
        usual = Recipe("", self.levels).to_dict()  # left out, so that a setting that is new one day changes no digest
        settings = {
            k: v for k, v in self.to_dict().items() if k not in cosmetic and (k == "levels" or v != usual.get(k))
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def override(self, **settings: Any) -> Recipe:
        """A copy with other settings. A ``timestep`` takes the place of several, another ``noise`` that of an inversion
        with its steps.

        Raises:
            TypeError: An unknown setting; the closest is named.
            ValueError: As for a new recipe.
        """
        if "normalise" in settings:
            _warn(stacklevel=3)
        settings = _american(settings)
        check_fields(Recipe, settings, f"recipe {self.name!r}")
        _check_several(settings, f"recipe {self.name!r}")
        if "timestep" in settings:
            settings = {"timesteps": ()} | settings
        if settings.get("noise", "inversion") != "inversion":
            settings = {"inversion_steps": INVERSION_STEPS} | settings
        return replace(self, **_with_first(settings))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form that :meth:`from_dict` reads back."""
        data = asdict(self) | {
            "levels": [list(level.activations) for level in self.levels],
            "discard": as_data(self.discard),
        }
        as_before = {k for group in _LATER if all(data[k] == v for k, v in group.items()) for k in group}
        kept = {k: v for k, v in data.items() if k not in as_before}
        return {ON_DISK.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

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
        _check_several(data, "recipe")
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
    """The settings of a recipe, each with its type and range, as msgspec checks them all at once; ``discard`` has forms
    that it does not tell apart.
    """
    kinds = get_type_hints(Recipe, include_extras=True)
    return msgspec.defstruct("Settings", [(name, kind) for name, kind in kinds.items() if name != "discard"])


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


def _plain_items(given: Any) -> Any:
    """A sequence as a tuple with Python's numbers; anything else as it is."""
    return tuple(map(plain, given)) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else given


def _with_first(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the first of ``timesteps`` as ``timestep``, where that is not given."""
    several = _plain_items(settings.get("timesteps"))
    first = several[0] if isinstance(several, tuple) and several else None
    known = "timestep" in settings or not isinstance(first, (int, float)) or isinstance(first, bool)
    return dict(settings) if known else {"timestep": first, **settings}


def _check_several(settings: Mapping[str, Any], what: str) -> None:
    """Raise ``ValueError`` if no timestep is given in place of the one."""
    several = settings.get("timesteps", "none given")
    if isinstance(several, Sequence) and not several:
        raise ValueError(
            f"{what}: timesteps must hold at least one timestep, got {several!r}; leave it out for the one"
        )


_LATER: tuple[dict[str, Any], ...] = (
    {"timesteps": (), "combine": "mean", "inversion_steps": INVERSION_STEPS},
    {"classes": ()},
    {"debias": 0, "components": None},
)
"""Settings that files of version 0.1 do not have. Those that came together are left out where all are as they were
before: files stay the same."""

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
def _init_as_written(self: Recipe, *args: Any, **settings: Any) -> None:
    """Also by the old name, and with several timesteps in place of the one, which is the third argument."""
    if "normalise" in settings:
        _warn(stacklevel=3)
        settings = _american(settings)
    _init(self, *args, **(settings if len(args) > 2 else _with_first(settings)))


Recipe.__init__ = _init_as_written  # type: ignore[method-assign]
