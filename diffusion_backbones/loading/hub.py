"""Repositories on the Hugging Face hub: one commit of a repository, of which only the needed files are downloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

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
"""What huggingface_hub raises when a request fails for any reason."""


@dataclass(frozen=True)
class Access:
    """How repositories are read.

    Args:
        token: Used in place of the one that ``hf auth login`` stored; False for none.
        local_files_only: Read the cache alone, and send no request.
    """

    token: str | bool | None = None
    local_files_only: bool = False


_access = ContextVar("access", default=Access())  # noqa: B039  (it is frozen)


@contextmanager
def access(token: str | bool | None = None, local_files_only: bool = False) -> Iterator[None]:
    """Open repositories in this block, in this thread, with a token or from the cache alone; see :class:`Access`.

    They are opened several calls away, behind ``create_model``, whose keywords say what is built and not who asks.
    """
    before = _access.set(Access(token, local_files_only))
    try:
        yield
    finally:
        _access.reset(before)


class HubRepo(Folder):
    """A repository on the Hugging Face hub, in the diffusers layout. Files are downloaded when they are asked for, and
    only those.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; resolved once, so that everything comes from one commit.
        cache_dir: huggingface_hub's cache; None is its default. Cached files are used where the hub cannot be asked.

    Attributes:
        commit: The commit that ``revision`` names.

    Raises:
        ConnectionError: The repository does not exist or is refused, or the hub cannot be reached, and the cache has no
            such revision.
    """

    _token: str | bool | None = None

    def __init__(self, repo: str, revision: str = "main", cache_dir: str | Path | None = None):
        self.repo, self.revision, self.cache_dir = repo, revision, cache_dir
        self._token = _access.get().token
        self._cached: Folder | None = None
        try:
            if _access.get().local_files_only:
                raise OfflineModeIsEnabled("local_files_only=True")
            info = HfApi(token=self._token).model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the token, which must not get into files; an unpickled one uses that of ``hf auth login``."""
        return {name: value for name, value in self.__dict__.items() if name != "_token"}

    def __deepcopy__(self, memo: dict[int, Any]) -> HubRepo:
        """The repository itself, since nothing in it changes."""
        return self

    def names(self) -> list[str]:
        """Names of all files of the repository, or of those in the cache where the hub cannot be asked."""
        return self._names

    def file(self, name: str) -> Path:
        """The local path of a file, which is downloaded if it is not in the cache.

        Raises:
            ConnectionError: It cannot be downloaded.
        """
        if self._cached:
            return self._cached.file(name)
        return self._download(name, self.commit)

    def json(self, name: str) -> Config:
        """Read a JSON file; see :meth:`Folder.json`."""
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
            return Path(
                hf_hub_download(self.repo, name, revision=revision, cache_dir=self.cache_dir, token=self._token)
            )
        except ERRORS as error:
            raise ConnectionError(f"{name} could not be downloaded: {explain(self.repo, revision, error)}") from error

    def text_fingerprint(self) -> str:
        """A string that changes with the commit."""
        return digest([self.repo, self.commit])

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}@{self.commit[:12]}" + (" (only what is cached of it)" if self._cached else "")


def explain(repo: str, revision: str, error: BaseException) -> str:
    """Say what went wrong with a repository, and what to do."""
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
        return f"{repo}: {'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else 'local_files_only=True'}"
    return (
        f"{repo}: the hub cannot be reached ({str(error) or type(error).__name__}); connect, or give "
        "checkpoint_path= a local folder or file"
    )


def open_checkpoint(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Source:
    """A checkpoint's repository, or its first mirror that can be read; with the denoiser that it takes from another
    repository, if it does.

    Raises:
        ConnectionError: None can be read; the message gives the reason of each, and what is known about the checkpoint.
    """
    family = FAMILIES[checkpoint.family]
    base = _open_first(checkpoint, cache_dir)
    if not checkpoint.denoiser:
        return base
    return replaced(base, family.denoiser, checkpoint.denoiser, cache_dir)


def replaced(base: Source, component: str, file: HubFile, cache_dir: str | Path | None) -> WithComponent:
    """A source with the weights of one network replaced by a file on the hub, and its config by the one beside that
    file, if there is one.
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
