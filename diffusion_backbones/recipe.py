"""The data model: what a checkpoint is, what a recipe reads from it, and who published it.

Everything here is plain frozen data without torch. A model is *declared* with these classes (see ``models/``); code that
needs to know something about a model reads it from here instead of comparing names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from diffusion_backbones import activations

NoiseRule = Literal["fixed", "random", "none"]
PromptPadding = Literal["max_length", "longest"]
Normalisation = Literal["none", "layer", "adaptive"]


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The tail of an error message: ``" Did you mean a, b or c?"``, or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(filter(None, [", ".join(matches[:-1]), matches[-1]])) + "?"


def check_fields(cls: type, given: Mapping[str, Any], what: str) -> None:
    """Raise ``TypeError`` with the closest match for the first key of ``given`` that is no field of ``cls``."""
    known = [f.name for f in fields(cls)]
    for key in given:
        if key not in known:
            raise TypeError(f"{what} has no setting {key!r}.{closest(key, known)} It has: {', '.join(known)}.")


@dataclass(frozen=True)
class Paper:
    """A publication: the one that chose a recipe or that introduced a checkpoint.

    Args:
        key: BibTeX key.
        title, authors, venue, year: As printed; ``authors`` in BibTeX form, joined by ``and``.
        arxiv: arXiv identifier without version, or empty.
        url: Where to read it if it is not on arXiv.
    """

    key: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str = ""
    url: str = ""

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url

    @property
    def bibtex(self) -> str:
        lines = [f"title = {{{self.title}}}", f"author = {{{self.authors}}}", f"year = {{{self.year}}}"]
        lines.append(f"booktitle = {{{self.venue}}}" if self.venue else "")
        lines.append(f"eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}" if self.arxiv else f"url = {{{self.url}}}")
        return f"@misc{{{self.key},\n  " + ",\n  ".join(filter(None, lines)) + "\n}"


@dataclass(frozen=True)
class License:
    """The licence of a set of weights. There is no default: whoever declares a checkpoint states it.

    Args:
        id: What the Hugging Face hub accepts in ``license:``; ``other`` needs ``name``.
        name: Name of a licence that is not in the hub's list.
        link: Where its text is.
        verified: False if no source at hand states it; the card then says so.
    """

    id: str
    name: str = ""
    link: str = ""
    verified: bool = True

    def __post_init__(self) -> None:
        if self.id == "other" and not self.name:
            raise ValueError("License(id='other') needs the licence's name=.")

    def __str__(self) -> str:
        return self.name or self.id


@dataclass(frozen=True)
class HubFile:
    """One file of one hub repository."""

    repo: str
    filename: str
    revision: str = "main"


@dataclass(frozen=True)
class TinyEncoder:
    """diffusers' ``AutoencoderTiny``, distilled from the image encoder of a checkpoint: its latents are close to those, scaled as the denoiser takes them.

    Args:
        configs: Folder below ``diffusion_backbones/configs`` with its architecture.
        license: Licence of its weights.
        file: Its weights, with their ``config.json`` beside them, or None if they travel in the package.
        source: Where it is said which checkpoints it fits.
    """

    configs: str
    license: License
    file: HubFile | None = None
    source: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TinyEncoder:
        """Inverse of ``dataclasses.asdict``."""
        return cls(**{**data, "license": License(**data["license"]), "file": HubFile(**data["file"]) if data["file"] else None})


@dataclass(frozen=True)
class Checkpoint:
    """One published set of weights, and everything that is a fact about it rather than about how it is read.

    Args:
        name: Short name, first half of every backbone's name (``sd15``).
        title: Name for people.
        hub_id: ``owner/repository`` on the Hugging Face hub in the diffusers layout, or empty for weights that travel in
            the package (``configs`` then also holds the weights).
        license: Licence of the weights.
        paper: Who introduced it.
        input_size: Side of the square images it was trained on, in pixels.
        family: The kind of network, a key of :data:`diffusion_backbones.families.FAMILIES`.
        configs: Folder below ``diffusion_backbones/configs`` with its architecture; defaults to ``name``.
        revision: A commit hash only where a source states one, else ``main``.
        mirrors: Repositories with the same files, tried in order when ``hub_id`` does not answer.
        status: A sentence about where the weights come from, such as a repository that was removed or replaced; it is told when they cannot be read.
        gated: Whether the hub asks for the licence to be accepted first.
        denoiser: A file that replaces the denoiser's weights; the rest then comes from ``hub_id``.
        tiny_encoder: What ``create_model(encoder="tiny")`` takes in place of its own image encoder, if there is one.
        encoder_float16: False where the image encoder overflows in float16; it then runs in float32.
        unverified: Facts above that no source at hand confirms, one sentence each.
    """

    name: str
    title: str
    hub_id: str
    license: License
    paper: Paper | None
    input_size: int
    family: str = "unet"
    configs: str = ""
    revision: str = "main"
    mirrors: tuple[str, ...] = ()
    status: str = ""
    gated: bool = False
    denoiser: HubFile | None = None
    tiny_encoder: TinyEncoder | None = None
    encoder_float16: bool = True
    unverified: tuple[str, ...] = ()

    @property
    def config_name(self) -> str:
        return self.configs or self.name

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Checkpoint:
        """Inverse of ``dataclasses.asdict``; an unknown key is a ``TypeError``."""
        check_fields(cls, data, "a checkpoint")
        kinds = {"license": License, "paper": Paper, "denoiser": HubFile}
        values: dict[str, Any] = {k: kinds[k](**v) if k in kinds and v else tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        tiny = data.get("tiny_encoder")
        return cls(**{**values, "tiny_encoder": TinyEncoder.from_dict(tiny) if tiny else None})


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
        levels: The chosen activations, fine to coarse. Each level may be given as a :class:`Level`, one id, or a sequence
            of ids. A flat list of ids is grouped by stride with :meth:`from_ids`, once the network is known.
        timestep: What the network receives and the noise level is read at, ``-1`` to ``T - 1`` (T = 1000 for Stable
            Diffusion); -1 is "before the first step" and goes with ``noise="none"``. The default, 50, is GDF's nominal
            timestep.
        noise: ``"fixed"`` adds one seeded canvas, the same for every image; ``"random"`` draws anew in every call;
            ``"none"`` gives the network the clean latent.
        ensemble: Number of noise draws whose activations are averaged, at least 1.
        seed: Seed of the fixed canvas.
        prompt: Text for every image unless a call overrides it.
        prompt_padding: ``"max_length"`` pads to the tokenizer's limit, as diffusers' pipelines do; ``"longest"`` does not.
        scaled: Whether latents are multiplied by the encoder's scaling factor, as the denoiser was trained.
        without: Components that are left out, such as one of several text encoders.
        discard: Channels of every activation that are set to zero, after the noise draws are averaged.
        normalise: What is done to every activation then: ``"layer"`` is a LayerNorm over channels without parameters
            (epsilon 1e-6), ``"adaptive"`` also the shift and scale with which the block behind the activation modulates it.
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
            raise ValueError(f"recipe {self.name!r}: levels must be a non-empty sequence of activation ids or of levels, got {given!r}")
        object.__setattr__(self, "levels", tuple(_level(level) for level in given))
        for key in ("without", "discard", "notes", "unverified"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.noise not in get_args(NoiseRule):
            rules = get_args(NoiseRule)
            raise ValueError(f"recipe {self.name!r}: noise must be one of {', '.join(rules)}, got {self.noise!r}.{closest(str(self.noise), rules)}")
        if self.normalise not in get_args(Normalisation):
            known = get_args(Normalisation)
            raise ValueError(f"recipe {self.name!r}: normalise must be one of {', '.join(known)}, got {self.normalise!r}.{closest(str(self.normalise), known)}")
        if not all(isinstance(channel, int) and channel >= 0 for channel in self.discard):
            raise ValueError(f"recipe {self.name!r}: discard must be channels from 0 up, got {self.discard}")
        if self.prompt_padding not in get_args(PromptPadding):
            raise ValueError(f"recipe {self.name!r}: prompt_padding must be 'max_length' or 'longest', got {self.prompt_padding!r}")
        if self.ensemble < 1 or (self.ensemble > 1 and self.noise == "none"):
            raise ValueError(f"recipe {self.name!r}: ensemble must be at least 1, and 1 without noise; got {self.ensemble} with noise={self.noise!r}")
        if not -1 <= self.timestep < 1000:
            raise ValueError(f"recipe {self.name!r}: timestep must be from -1 to 999, got {self.timestep}")
        if self.timestep < 0 and self.noise != "none":
            raise ValueError(f"recipe {self.name!r}: timestep {self.timestep} lies before the first step, where no noise level is defined; use noise='none'")
        if not isinstance(self.prompt, str):
            raise ValueError(f"recipe {self.name!r}: prompt must be one string, got {type(self.prompt).__name__}; give a list per call instead")

    @property
    def ids(self) -> tuple[str, ...]:
        """Every activation id, level by level."""
        return tuple(id for level in self.levels for id in level.activations)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change whenever a setting that changes the features does."""
        cosmetic = {"name", "paper", "nominal_timestep", "source", "notes", "unverified", "input_size"}
        usual = Recipe("", self.levels).to_dict()                   # left out, so that a setting that is new one day changes no digest
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
            raise FileNotFoundError(f"recipe={str(path)!r} is no file; give a YAML or JSON file, a Recipe, or a list of activation ids")
        try:
            data = yaml.safe_load(path.read_text())          # JSON is a subset of YAML
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
