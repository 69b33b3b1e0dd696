"""Where a checkpoint's files come from: a diffusers folder, a hub repository, a single file, or one on top of another.

All of them answer the same questions (:class:`Source`), so nothing behind them knows which it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from diffusion_backbones import tensors
from diffusion_backbones.families import Config, Configs, Family
from diffusion_backbones.recipe import Checkpoint
from diffusion_backbones.tensors import TensorFiles

log = logging.getLogger(__name__)

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Source(Protocol):
    """A place that holds a checkpoint."""

    provenance: dict[str, str]
    """Where it is, for the record: ``repo`` and ``commit``, or ``path``."""

    def configs(self, family: Family) -> Configs:
        """The configs of the denoiser, the image encoder, the scheduler and the text encoders that are there."""

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of a component, unread; ``half`` prefers float16 files where there are both."""

    def text(self, component: str) -> tuple[Any, Any]:
        """(tokenizer, text model) of a text encoder, float32."""

    def text_fingerprint(self) -> str:
        """Changes whenever the text encoders do."""


class Folder:
    """A folder in the diffusers layout.

    Raises:
        FileNotFoundError: It is not there, or is no such folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.provenance = {"path": str(self.path)}
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder")

    def names(self) -> list[str]:
        """Relative names of all files."""
        return [path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob("*")) if path.is_file()]

    def file(self, name: str) -> Path:
        """The local path of one of :meth:`names`."""
        return self.path / name

    def json(self, name: str) -> Config:
        """Read a JSON file.

        Raises:
            FileNotFoundError: It is not there; what the folder holds is listed.
            ValueError: It is no JSON object.
        """
        if name not in self.names():
            here = sorted({PurePosixPath(n).parts[0] for n in self.names()})
            raise FileNotFoundError(f"{self} has no {name}; it holds {', '.join(here) or 'nothing'}. A checkpoint is a folder in the diffusers layout, with unet/config.json and so on.")
        try:
            data: Config = json.loads(self.file(name).read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{self}: {name} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{self}: {name} must hold a JSON object, got {type(data).__name__}")
        return data

    def configs(self, family: Family) -> Configs:
        required = [family.denoiser, *([family.encoder] if family.encoder else [])]
        configs = {name: self.json(f"{name}/config.json") for name in required}
        configs["scheduler"] = self.json("scheduler/scheduler_config.json")
        for name in family.text_encoder_names(configs):
            if f"{name}/config.json" in self.names():
                configs[name] = self.json(f"{name}/config.json")
        return configs

    def tensors(self, component: str, half: bool) -> TensorFiles:
        return TensorFiles(self._weights(component, "diffusion_pytorch_model", half), _modern)

    def _weights(self, component: str, stem: str, half: bool) -> list[Path]:
        try:
            [name] = tensors.choose(self.names(), component, stem, half)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: {error}") from error
        if not name.endswith(".json"):
            return [self.file(name)]
        parts = tensors.shards(self.file(name))
        return [self.file(f"{component}/{part.name}") for part in parts]

    def text(self, component: str) -> tuple[Any, Any]:
        number = component.removeprefix("text_encoder")
        return self.tokenizer(f"tokenizer{number}"), self._text_model(component)

    def tokenizer(self, component: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._fetched(component))

    def _text_model(self, component: str) -> Any:
        import torch
        import transformers

        architectures = self.json(f"{component}/config.json").get("architectures") or ["CLIPTextModel"]
        weights = self._weights(component, "model", half=False)
        variant = "fp16" if ".fp16." in weights[0].name else None
        cls = getattr(transformers, architectures[0])
        return cls.from_pretrained(self._fetched(component), use_safetensors=True, variant=variant, dtype=torch.float32).eval()

    def _fetched(self, component: str) -> Path:
        """The local folder of a component with its small files in it."""
        small = [name for name in self.names() if name.startswith(component + "/") and not name.endswith((".safetensors", *tensors.PICKLES, ".msgpack", ".onnx", ".h5"))]
        if not small:
            raise FileNotFoundError(f"{self} has no {component}/, so prompts cannot be encoded; give prompt_embeds= instead")
        return [self.file(name) for name in small][0].parent

    def text_fingerprint(self) -> str:
        parts = [str(self.path.resolve())]
        for path in sorted(self.path.glob("t*/*")):                     # text_encoder*, tokenizer*
            stat = path.stat()
            parts.append(f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return _digest(parts)

    def __str__(self) -> str:
        return str(self.path)


class HubRepo(Folder):
    """A repository on the Hugging Face hub. Files are downloaded when they are asked for, and only those.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; resolved once, so that everything comes from one commit.
        cache_dir: huggingface_hub's cache; None is its default.

    Raises:
        ConnectionError: The hub does not have it, does not give it, or cannot be reached and nothing is cached.
    """

    def __init__(self, repo: str, revision: str = "main", cache_dir: str | Path | None = None):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        self.repo, self.cache_dir = repo, cache_dir
        try:
            info = HfApi().model_info(repo, revision=revision)
            self.commit, self._names = info.sha or revision, [s.rfilename for s in info.siblings or []]
        except HfHubHTTPError as error:
            raise ConnectionError(_explain(repo, revision, error)) from error
        except (HTTPError, OSError) as error:
            self.commit, self._names = self._cached(revision, error)
        self.path = Path(repo)
        self.provenance = {"repo": repo, "commit": self.commit}

    def _cached(self, revision: str, error: Exception) -> tuple[str, list[str]]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self.repo, revision=revision, cache_dir=self.cache_dir, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ConnectionError(f"{self.repo}: the hub cannot be reached ({error}) and nothing of it is in the cache; connect, or give checkpoint_path= a local folder or file") from error
        return folder.name, [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]

    def names(self) -> list[str]:
        return self._names

    def file(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(hf_hub_download(self.repo, name, revision=self.commit, cache_dir=self.cache_dir))
        except HfHubHTTPError as error:
            raise ConnectionError(_explain(self.repo, self.commit, error)) from error
        except OSError as error:
            raise ConnectionError(f"{self.repo}: {name} could not be downloaded: {error}") from error

    def text_fingerprint(self) -> str:
        return _digest([self.repo, self.commit])

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}@{self.commit[:12]}"


def _explain(repo: str, revision: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} is not on the hub: it was removed or renamed, or is private and needs `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{repo} refuses access ({status}): check the token (`hf auth whoami`) and its rights"
    return f"{repo}: the hub answered {error}"


def open_hub(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> HubRepo:
    """A checkpoint's repository, or the first of its mirrors that answers.

    Raises:
        ConnectionError: None answers; each is named with its reason, and what is known about the checkpoint is said.
    """
    reasons = []
    for repo, revision in [(checkpoint.hub_id, checkpoint.revision), *((mirror, "main") for mirror in checkpoint.mirrors)]:
        try:
            source = HubRepo(repo, revision, cache_dir)
        except ConnectionError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("%s is read from the mirror %s, which nobody compared with the original. %s", checkpoint.name, repo, "; ".join(reasons))
        return source
    said = f" {checkpoint.status}" if checkpoint.status else ""
    gate = " It is gated: its licence must be accepted on the hub first." if checkpoint.gated else ""
    raise ConnectionError(f"{checkpoint.name} cannot be downloaded. {'; '.join(reasons)}.{said}{gate}")


class WithDenoiser:
    """Another source with the denoiser's weights taken from one file, as CleanDIFT publishes them."""

    def __init__(self, base: Source, component: str, file: Path, provenance: Mapping[str, str]):
        self.base, self.component, self._file = base, component, file
        self.provenance = base.provenance | {f"{component}_{k}": v for k, v in provenance.items()}

    def configs(self, family: Family) -> Configs:
        return self.base.configs(family)

    def tensors(self, component: str, half: bool) -> TensorFiles:
        return TensorFiles([self._file], _modern) if component == self.component else self.base.tensors(component, half)

    def text(self, component: str) -> tuple[Any, Any]:
        return self.base.text(component)

    def text_fingerprint(self) -> str:
        return self.base.text_fingerprint()


def _modern(name: str) -> str:
    """Attention layers of old VAE files are named as before diffusers 0.18, and some hold 1 x 1 convolutions."""
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name)


def _digest(parts: Iterator[str] | list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
