"""Where a checkpoint's files come from: a diffusers folder, or another source with the weights of one network replaced.

Every source has the same methods (:class:`Source`), so its callers need not know its kind. Repositories are in
:mod:`diffusion_backbones.loading.hub`, single files in :mod:`diffusion_backbones.loading.single_file`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_backbones.families import FAMILIES, Architecture
from diffusion_backbones.loading import fingerprint
from diffusion_backbones.loading.weight_names import choose, is_usual
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from diffusion_backbones.ops.safetensors_io import TensorFiles

log = logging.getLogger(__name__)

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SMALL = (".json", ".txt", ".model", ".jinja")  # what configs and tokenizers are made of


class Source(Protocol):
    """A place that holds a checkpoint: configs, weights, and text encoders with their tokenizers."""

    @property
    def provenance(self) -> dict[str, str]:
        """Where the checkpoint is, for the record: ``repo`` and ``commit``, or ``path``."""

    def configs(self, family: type[Architecture]) -> Configs:
        """The configs of the denoiser, the image encoder and the scheduler, at least."""

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of a component, unread.

        Args:
            component: Name of its folder, ``unet`` ...
            half: Whether they are used in 16 bits. Then float16 files are preferred where there are both; otherwise a
                warning says that there are only those.
        """

    def text(self, component: str, words: Path | None = None) -> tuple[Any, Any]:
        """Tokenizer and text model of a text encoder, on the CPU, in float32; language models of billions of parameters
        keep the dtype of their files.

        Args:
            component: Name of its folder, ``text_encoder`` ...
            words: The folder of another tokenizer.
        """

    def text_config(self, component: str) -> Config:
        """The config of a text encoder."""

    def tokenizer_folder(self, component: str) -> Path:
        """Where the files of a tokenizer are, ``tokenizer`` ...

        Raises:
            FileNotFoundError: There are none.
        """

    def text_fingerprint(self) -> str:
        """A string that changes whenever the text encoders do."""


class Folder:
    """A folder in the diffusers layout.

    Raises:
        FileNotFoundError: There is no such folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.provenance = {"path": str(self.path)}
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder")

    def names(self) -> list[str]:
        """Relative names of the files in the folder and in its sub-folders; the layout goes no deeper."""
        return [
            path.relative_to(self.path).as_posix()
            for depth in ("*", "*/*")
            for path in sorted(self.path.glob(depth))
            if path.is_file()
        ]

    def file(self, name: str) -> Path:
        """The local path of one of :meth:`names`."""
        return self.path / name

    def json(self, name: str) -> Config:
        """Read a JSON file.

        Raises:
            FileNotFoundError: The file is not there; the message lists what the folder holds.
            ValueError: The file does not hold a JSON object.
        """
        names = self.names()
        if name not in names:
            raise FileNotFoundError(
                f"{self} has no {name}; it holds {self.held()}. A checkpoint is in the diffusers layout, with "
                "unet/config.json and so on."
            )
        try:
            data: Config = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self}: {name} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{self}: {name} must hold a JSON object, got {type(data).__name__}")
        return data

    def holds(self, family: type[Architecture]) -> bool:
        """Whether the folder has a denoiser of a family."""
        name = self._where(family.denoiser, "config.json")
        return name in self.names() and family.matches(self.json(name))

    def has(self, component: str) -> bool:
        """Whether the folder holds something of a component, be it incomplete, in its sub-folder or as the one network
        at the root.
        """
        names = self.names()
        if any(name.startswith(f"{component}/") for name in names):
            return True
        alone = {network for family in FAMILIES.values() if family.denoiser == component for network in family.networks}
        return "config.json" in names and self.json("config.json").get("_class_name") in alone

    def held(self) -> str:
        """What lies in the folder, by name."""
        return ", ".join(sorted({PurePosixPath(name).parts[0] for name in self.names()})) or "nothing"

    def _where(self, component: str, file: str) -> str:
        """Where a component's file is: in its folder, or at the root of a repository that holds one network alone."""
        inside = f"{component}/{file}"
        return file if file in self.names() and inside not in self.names() else inside

    def configs(self, family: type[Architecture]) -> Configs:
        """The configs of the denoiser, the image encoder and the scheduler; of the pipeline where the family needs it.

        Raises:
            FileNotFoundError: One is not there.
        """
        return {component: self.json(name) for component, name in self._config_names(family).items()}

    def over(self, configs: Configs, family: type[Architecture]) -> Configs:
        """The configs of a base, with those that the folder has in their place."""
        names, own = self.names(), self._config_names(family)
        here = {component: name for component, name in own.items() if name in names}
        if not self.has(family.denoiser):  # what lies at the root is of another network
            here.pop(family.denoiser, None)
        return {**configs, **{component: self.json(name) for component, name in here.items()}}

    def _config_names(self, family: type[Architecture]) -> dict[str, str]:
        """Component -> where its config is, or ought to be."""
        found = {family.denoiser: self._where(family.denoiser, "config.json")}
        if family.encoder:
            found[family.encoder] = f"{family.encoder}/config.json"
        found["scheduler"] = self._where("scheduler", "scheduler_config.json")
        if family.needs_model_index and "model_index.json" in self.names():
            found["model_index"] = "model_index.json"
        return found

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of a component, unread; see :meth:`Source.tensors`.

        Raises:
            FileNotFoundError: There are none, or a shard is missing.
            ValueError: There is only a pickle, or a file is broken.
        """
        from diffusion_backbones.ops.safetensors_io import TensorFiles  # torch, and a name's commit is asked without

        return TensorFiles(self._weights(component, "diffusion_pytorch_model", half), modern_attention)

    def _weights(self, component: str, stem: str, half: bool) -> list[Path]:
        names = self.names()
        try:
            name = choose(names, component, stem, half)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: {error}") from error
        if "fp16" in name and not half:
            log.warning(
                "%s has the weights of %s in float16 only, and they are used in higher precision", self, component
            )
        elif not is_usual(name, stem):
            log.warning("%s has the weights of %s as %s alone, which is read", self, component, name)
        if not name.endswith(".json"):
            return [self.file(name)]
        shards = {str(PurePosixPath(name).with_name(shard)) for shard in self.weight_map(name).values()}
        return self.present(name, sorted(shards))

    def weight_map(self, index: str) -> dict[str, str]:
        """Name of a tensor -> name of the shard that holds it.

        Args:
            index: Name of an index of shards.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is not such an index.
        """
        found = self.json(index).get("weight_map")
        if not isinstance(found, dict) or not all(map(_is_name, found.values())):
            raise ValueError(
                f"{self}: {index} is not an index of shards: it needs a 'weight_map' from tensors to files beside it"
            )
        return found

    def present(self, index: str, shards: Sequence[str]) -> list[Path]:
        """The local paths of shards, by name.

        Raises:
            FileNotFoundError: One is not there.
        """
        for shard in shards:
            if shard not in self.names():
                raise FileNotFoundError(f"{self}: {index} needs {shard}, which is not there; download or save it again")
        return [self.file(shard) for shard in shards]

    def text(self, component: str, words: Path | None = None) -> tuple[Any, Any]:
        """Tokenizer and text model; see :meth:`Source.text`."""
        from diffusion_backbones.families.text import reading

        files = self._weights(component, "model", half=False)
        words = words or self.tokenizer_folder(component.replace("text_encoder", "tokenizer"))
        return reading.read(self.text_config(component), files, words, f"{self}: {component}/config.json")

    def text_config(self, component: str) -> Config:
        """The config of a text encoder."""
        return self.json(f"{component}/config.json")

    def tokenizer_folder(self, component: str) -> Path:
        """Where the files of a tokenizer are; see :meth:`Source.tokenizer_folder`."""
        files = [self.file(name) for name in self.names() if name.startswith(component + "/") and name.endswith(_SMALL)]
        if not files:
            raise FileNotFoundError(f"{self} has no {component}/, so prompts cannot be encoded")
        return files[0].parent

    def text_fingerprint(self) -> str:
        """A string that changes with the content of any file of text encoders and tokenizers, and with nothing else."""
        parts = ("text_encoder*/*", "tokenizer*/*")  # and not transformer/, which is far larger
        files = sorted(path for part in parts for path in self.path.glob(part) if path.is_file())
        return digest(f"{path.parent.name}/{path.name} {fingerprint.content(path)}" for path in files)

    def __str__(self) -> str:
        return str(self.path)


class WithComponent:
    """Another source with the weights of one network replaced by one file, as CleanDIFT's and PixArt's denoisers are
    published.

    Args:
        base: Source of everything else.
        component: Name of the network.
        file: Returns the path of its weights; called when they are read.
        provenance: Where that file comes from.
        config: The network's own config; None if it is that of ``base``.
    """

    def __init__(
        self,
        base: Source,
        component: str,
        file: Callable[[], Path],
        provenance: Mapping[str, str],
        config: Config | None = None,
    ):
        self.base, self.component, self._file, self.config = base, component, file, config
        self.provenance = base.provenance | {f"{component}_{k}": v for k, v in provenance.items()}

    def configs(self, family: type[Architecture]) -> Configs:
        """The configs of ``base``, with the network's own."""
        configs = self.base.configs(family)
        return {**configs, self.component: self.config} if self.config else configs

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of the file, or those of ``base``; see :meth:`Source.tensors`."""
        if component != self.component:
            return self.base.tensors(component, half)

        from diffusion_backbones.ops.safetensors_io import TensorFiles  # torch

        return TensorFiles([self._file()], modern_attention)

    def text(self, component: str, words: Path | None = None) -> tuple[Any, Any]:
        """Tokenizer and text model of ``base``."""
        return self.base.text(component, words)

    def text_config(self, component: str) -> Config:
        """The config of a text encoder of ``base``."""
        return self.base.text_config(component)

    def tokenizer_folder(self, component: str) -> Path:
        """The folder of a tokenizer of ``base``."""
        return self.base.tokenizer_folder(component)

    def text_fingerprint(self) -> str:
        """The fingerprint of ``base``."""
        return self.base.text_fingerprint()

    def __str__(self) -> str:
        return str(self.base)


def modern_attention(name: str) -> str:
    """The present name of a tensor: in old VAE files, attention layers are named as before diffusers 0.18."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name
    )


def _is_name(value: Any) -> bool:
    """Whether a value is the name of a file, without a folder."""
    return isinstance(value, str) and PurePosixPath(value).name == value


def digest(parts: Iterable[str]) -> str:
    """24 hexadecimal digits that name ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
