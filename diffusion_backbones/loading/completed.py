"""A part of a checkpoint, and another checkpoint for what it lacks: one rule for files and folders, in any names.

What the part holds is taken from it; everything else, configs included, from the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_backbones.families import Architecture
from diffusion_backbones.loading.single_file import SingleFile
from diffusion_backbones.loading.source import Folder, Source, digest
from diffusion_backbones.ops.safetensors_io import TensorFiles
from diffusion_backbones.spec.configs import Config, Configs


def rule(hub_id: str) -> str:
    """What completes a part of a checkpoint, as a sentence.

    Args:
        hub_id: The repository of the checkpoint that was asked for; empty where there is none.
    """
    rest = f"add pretrained=True to take them from {hub_id}, or " if hub_id else ""
    return (
        f"What a file or a folder lacks comes from a whole checkpoint: {rest}give checkpoint_path= beside "
        "'local-dir:FOLDER' or 'hf-hub:OWNER/REPO' of one in the diffusers layout, with recipe=."
    )


def components(network: Architecture) -> list[str]:
    """What a network needs, by the names of the diffusers layout: the networks, and the tokenizers."""
    text = [*network.text_encoders, *(_tokenizer(name) for name in network.text_encoders)]
    return [network.denoiser, *([network.encoder] if network.encoder else []), *text]


class Completed:
    """A part over a base.

    Args:
        part: Holds something of a checkpoint.
        family: The family of the checkpoint.
        base: Gives what the part lacks; None if there is nothing that does.
        lacks: What the part lacks, by the names of the diffusers layout.
        hub_id: Named in errors as the place that could.
    """

    def __init__(
        self,
        part: Folder | SingleFile,
        family: type[Architecture],
        base: Source | None,
        lacks: Sequence[str],
        hub_id: str = "",
    ):
        self.part, self.family, self.base, self.lacks, self.hub_id = part, family, base, lacks, hub_id

    def __str__(self) -> str:
        return str(self.part)

    @property
    def provenance(self) -> dict[str, str]:
        """Where the base is, and beside that where each network of the part is."""
        if not self.base:
            return self.part.provenance
        networks = [name for name in components(self._network) if not name.startswith("tokenizer")]
        place = self.part.provenance["path"]
        return self.base.provenance | {f"{name}_path": place for name in networks if self.part.has(name)}

    @property
    def _network(self) -> Architecture:
        return self.family(self.configs(self.family))

    def check(self) -> None:
        """Raise ``FileNotFoundError`` if there is no base for what the part lacks."""
        if not self.base:
            raise self._lacking()

    def configs(self, family: type[Architecture]) -> Configs:
        """The configs of the base, with those that a folder brings.

        Raises:
            FileNotFoundError: A folder lacks one, and there is no base.
        """
        if self.base:
            return self.part.over(self.base.configs(family), family)
        own = self.part.over({}, family)
        needed = [family.denoiser, *([family.encoder] if family.encoder else []), "scheduler"]
        if any(name not in own for name in needed):
            raise self._lacking()
        return own

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of a network; see :meth:`Source.tensors`."""
        return self._holder(component).tensors(component, half)

    def text(self, component: str, words: Path | None = None) -> tuple[Any, Any]:
        """Tokenizer and text model, perhaps of two places; see :meth:`Source.text`."""
        model, tokenizer = self._holder(component), self._holder(_tokenizer(component))
        if words is None and model is not tokenizer:
            words = tokenizer.tokenizer_folder(_tokenizer(component))
        return model.text(component, words)

    def text_config(self, component: str) -> Config:
        """The config of a text encoder."""
        return self._holder(component).text_config(component)

    def tokenizer_folder(self, component: str) -> Path:
        """Where the files of a tokenizer are."""
        return self._holder(component).tokenizer_folder(component)

    def text_fingerprint(self) -> str:
        """That of whoever holds the text encoders and tokenizers, or of both."""
        text = [name for name in components(self._network) if name.startswith(("text", "tokenizer"))]
        holders = dict.fromkeys(map(self._holder, text))
        prints = [holder.text_fingerprint() for holder in holders]
        return prints[0] if len(prints) == 1 else digest(prints)

    def _holder(self, component: str) -> Source:
        if self.part.has(component):
            return self.part
        if self.base:
            return self.base
        raise self._lacking()

    def _lacking(self) -> FileNotFoundError:
        held = f"; it holds {self.part.held()}" if isinstance(self.part, Folder) else ""
        return FileNotFoundError(f"{self.part} lacks {', '.join(self.lacks)}{held}. {rule(self.hub_id)}")


def _tokenizer(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")
