"""Repositories on the Hugging Face hub: one commit of one repository, of which the needed files are downloaded."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as _HTTPError  # type: ignore[attr-defined]  # of the HTTP client that this version uses

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.loading.source import Folder, Source, WithComponent, digest
from diffusion_backbones.spec.checkpoint import Checkpoint, HubFile
from diffusion_backbones.spec.configs import Config

log = logging.getLogger(__name__)

ERRORS: tuple[type[Exception], ...] = (_HTTPError, OSError)
"""What huggingface_hub raises when a request fails, whichever way."""


class HubRepo(Folder):
    """A repository on the Hugging Face hub, in the diffusers layout. Files are downloaded when they are asked for, and
    only those.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; resolved once, so that everything comes from one commit.
        cache_dir: huggingface_hub's cache; None is its default. Where the hub gives nothing, what is cached is used.

    Attributes:
        commit: What ``revision`` stands for.

    Raises:
        ConnectionError: The hub does not have it, does not give it, or cannot be reached, and nothing is cached.
    """

    def __init__(self, repo: str, revision: str = "main", cache_dir: str | Path | None = None):
        self.repo, self.revision, self.cache_dir = repo, revision, cache_dir
        self._cached: Folder | None = None
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except ERRORS as error:
            self._cached = self._cached_part(error)
            self.commit, self._names = self._cached.path.name, self._cached.names()
        else:
            self.commit, self._names = info.sha or revision, [sibling.rfilename for sibling in info.siblings or []]
        self.provenance = {"repo": repo, "commit": self.commit}

    def _cached_part(self, error: Exception) -> Folder:
        try:  # without patterns, huggingface_hub refuses a snapshot that is known to be only a part
            path = snapshot_download(
                self.repo, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True, allow_patterns=[]
            )
        except LocalEntryNotFoundError:
            raise ConnectionError(
                f"{explain(self.repo, self.revision, error)}; revision {self.revision!r} of it is not in the cache "
                "either"
            ) from error
        level = logging.INFO if isinstance(error, OfflineModeIsEnabled) else logging.WARNING
        log.log(level, "%s is read from the cache: %s", self.repo, explain(self.repo, self.revision, error))
        return Folder(path)

    def names(self) -> list[str]:
        return self._names

    def file(self, name: str) -> Path:
        if self._cached:
            return self._cached.file(name)
        return self._download(name, self.commit)

    def json(self, name: str) -> Config:
        data = super().json(name)
        if not self._cached and self.revision != self.commit and not self._known(name):
            self._download(
                name, self.revision
            )  # by its branch, so that huggingface_hub notes the commit for a start without network
        return data

    def _known(self, name: str) -> bool:
        return try_to_load_from_cache(self.repo, name, self.cache_dir, self.revision) == str(self.file(name))

    def _download(self, name: str, revision: str) -> Path:
        try:
            return Path(hf_hub_download(self.repo, name, revision=revision, cache_dir=self.cache_dir))
        except ERRORS as error:
            raise ConnectionError(f"{name} could not be downloaded: {explain(self.repo, revision, error)}") from error

    def text_fingerprint(self) -> str:
        return digest([self.repo, self.commit])

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}@{self.commit[:12]}" + (" (only what is cached of it)" if self._cached else "")


def explain(repo: str, revision: str, error: BaseException) -> str:
    """What went wrong with a repository, and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return explain(repo, revision, error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo} and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} is not on the hub: it was removed or renamed, or is private and needs `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    if isinstance(error, DisabledRepoError):
        return f"the hub has disabled access to {repo}"
    if status in (401, 403):
        return f"{repo} refuses access ({status}): check the token (`hf auth whoami`) and its rights"
    if status:
        return f"{repo}: the hub answered {status} ({str(error).splitlines()[0]})"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo}: HF_HUB_OFFLINE is set"
    return (
        f"{repo}: the hub cannot be reached ({str(error) or type(error).__name__}); connect, or give "
        "checkpoint_path= a local folder or file"
    )


def open_checkpoint(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Source:
    """A checkpoint's repository, or the first of its mirrors that gives its files, and the denoiser it has from
    elsewhere.

    Raises:
        ConnectionError: None answers; each is named with its reason, and what is known about the checkpoint is said.
    """
    family = FAMILIES[checkpoint.family]
    base = _open_first(checkpoint, cache_dir)
    if not checkpoint.denoiser:
        return base
    return replaced(base, family.denoiser, checkpoint.denoiser, cache_dir)


def replaced(base: Source, component: str, file: HubFile, cache_dir: str | Path | None) -> WithComponent:
    """A source with the weights of one network from a file on the hub, and with the config that lies beside that file,
    if one does.
    """
    repo = HubRepo(file.repo, file.revision, cache_dir)
    beside = str(PurePosixPath(file.filename).with_name("config.json"))
    config = repo.json(beside) if beside in repo.names() else None
    return WithComponent(base, component, partial(repo.file, file.filename), repo.provenance, config)


def _open_first(checkpoint: Checkpoint, cache_dir: str | Path | None) -> HubRepo:
    reasons = []
    for repo, revision in [
        (checkpoint.hub_id, checkpoint.revision),
        *((mirror, "main") for mirror in checkpoint.mirrors),
    ]:
        try:
            source = HubRepo(repo, revision, cache_dir)
            source.configs(FAMILIES[checkpoint.family])  # a gated repository lists its files and then gives none
        except (ConnectionError, FileNotFoundError) as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning(
                "%s is read from the mirror %s, which nobody compared with the original. %s",
                checkpoint.name,
                repo,
                "; ".join(reasons),
            )
        return source
    said = f" {checkpoint.status}" if checkpoint.status else ""
    gate = " It is gated: its licence must be accepted on the hub first." if checkpoint.gated else ""
    raise ConnectionError(f"{checkpoint.name} cannot be downloaded. {'; '.join(reasons)}.{said}{gate}")
