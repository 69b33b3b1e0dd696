"""A checkpoint: one published set of weights, its licence, its files and who published it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusion_backbones.spec.validation import check_fields, convert

T = TypeVar("T")


@dataclass(frozen=True)
class Paper:
    """A publication: the one that chose a recipe or that introduced a checkpoint.

    Args:
        key: BibTeX key.
        title, authors, venue, year: As printed; ``authors`` in BibTeX form, joined by ``and``, or empty if no source at
            hand names them.
        arxiv: arXiv identifier without version, or empty.
        url: Address of its text if it is not on arXiv.
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
        """Address of the text."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url

    @property
    def bibtex(self) -> str:
        """BibTeX entry, in the form that :mod:`diffusion_backbones.models.papers` reads."""
        lines = [f"title = {{{self.title}}}", f"author = {{{self.authors}}}" if self.authors else ""]
        lines += [f"year = {{{self.year}}}", f"booktitle = {{{self.venue}}}" if self.venue else ""]
        lines.append(
            f"eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}" if self.arxiv else f"url = {{{self.url}}}"
        )
        return f"@misc{{{self.key},\n  " + ",\n  ".join(filter(None, lines)) + "\n}"


@dataclass(frozen=True)
class License:
    """The licence of a set of weights. There is no default: every declaration of a checkpoint states it.

    Args:
        id: Identifier that the Hugging Face hub accepts in ``license:``; ``other`` needs ``name``.
        name: Name of a licence that is not in the hub's list.
        link: Address of its text.
        verified: False if no source at hand states it; the card then says so.

    Raises:
        ValueError: ``id`` is ``other`` and ``name`` is missing.
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
    """diffusers' ``AutoencoderTiny``, distilled from the image encoder of a checkpoint. Its latents are close to that
    encoder's, scaled as the denoiser takes them.

    Args:
        configs: Folder below ``diffusion_backbones/configs`` with its architecture.
        license: Licence of its weights.
        file: Its weights, with their ``config.json`` beside them, or None if they travel in the package.
        source: Address of the text that says which checkpoints it fits.
    """

    configs: str
    license: License
    file: HubFile | None = None
    source: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TinyEncoder:
        """Inverse of ``dataclasses.asdict``, also after a round trip through JSON; errors as for a checkpoint."""
        return _from_dict(cls, data, "tiny encoder")


@dataclass(frozen=True)
class Checkpoint:
    """One published set of weights, and everything that is a fact about it rather than about how it is read.

    Args:
        name: Short name, first half of every backbone's name (``sd15``).
        title: Name for people.
        hub_id: ``owner/repository`` on the Hugging Face hub in the diffusers layout, or empty for weights that travel
            in the package (``configs`` then also holds the weights).
        license: Licence of the weights.
        paper: The publication that introduced it.
        input_size: Side of the square images it was trained on, in pixels.
        family: The kind of network, a key of :data:`diffusion_backbones.families.FAMILIES`.
        configs: Folder below ``diffusion_backbones/configs`` with its architecture; defaults to ``name``.
        revision: A commit hash only where a source states one, else ``main``.
        mirrors: Repositories with the same files, tried in order when ``hub_id`` does not answer.
        status: A sentence about where the weights come from, such as a repository that was removed or replaced; errors
            repeat it when the weights cannot be read.
        gated: Whether the hub asks for the licence to be accepted first.
        denoiser: A file that replaces the denoiser's weights; the rest then comes from ``hub_id``.
        tiny_encoder: The encoder that ``create_model(encoder="tiny")`` takes in place of its own, if there is one.
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
        """Folder of its architecture below ``diffusion_backbones/configs``."""
        return self.configs or self.name

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Checkpoint:
        """Inverse of ``dataclasses.asdict``, also after a round trip through JSON.

        Raises:
            TypeError: A key is unknown; the closest is named.
            ValueError: A key is missing, or a value has another type; the error gives its path.
        """
        return _from_dict(cls, data, "checkpoint")


def _from_dict(cls: type[T], data: Mapping[str, Any], what: str) -> T:
    check_fields(cls, data, what)
    instance: T = convert(data, cls, what)
    return instance
