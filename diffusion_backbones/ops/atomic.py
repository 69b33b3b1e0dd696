"""Writing files whole or not at all, also where several processes write to one folder."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".diffusion_backbones-", ".part"
_TEMPORARY = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{12}}{re.escape(SUFFIX)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of ``path`` when the block ends without an error.

    Whatever happens, ``path`` is either whole or as it was. Every call has a temporary file of its own, beside
    ``path``, and removes no other. Its name is as long for every ``path``, so that it fits wherever ``path`` does. The
    new file gets the mode that this user's new files have.

    Raises:
        OSError: The folder does not exist or cannot be written to.
    """
    part, held = _new_part(path.parent)
    try:
        mode = part.stat().st_mode  # some writers make their files private
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        held.close()
        part.unlink(missing_ok=True)


def _new_part(folder: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file, and what holds it as long as it is open, so that no other process takes it for left
    over.
    """
    while True:
        part = folder / f"{PREFIX}{uuid.uuid4().hex[:12]}{SUFFIX}"
        held = part.open("xb")
        if not fcntl:
            held.close()  # there, an open file can be neither written by others nor renamed
            return part, held
        _lock(held.fileno())
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held.fileno()), part.stat()):
                return part, held
        held.close()  # another process removed it before it was held


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as part:
        part.write_bytes(text.encode())


def check_writable(path: Path) -> None:
    """Make the folder of a file that will be written, and check that files can be made there.

    Raises:
        OSError: They cannot; the message names ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part, held = _new_part(path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    held.close()
    part.unlink()


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder: those of :func:`replacing` that nobody holds,
    and no others.
    """
    try:
        left = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    except OSError:  # not there yet, or not ours to read
        return
    for path in left:
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                _remove_unheld(path)


def _remove_unheld(path: Path) -> None:
    if fcntl:  # without locks nobody knows
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError if another process holds it
            path.unlink()


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder: of several processes that read a file in it and write it again, one at a time does so.

    Where the file system has no locks, nobody waits.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield
        return
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Hold an open file until it is closed, if the file system has locks."""
    if fcntl:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Check that a file that will be written is none of those that are read, through links neither.

    Raises:
        ValueError: It is one of them.
    """
    for source in inputs:
        with suppress(OSError):  # it is not there yet
            if path.samefile(source):
                raise ValueError(f"{path} is {source}, which is read; writing it would destroy that. Choose another.")
