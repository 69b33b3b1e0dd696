"""Writing files whole or not at all."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of ``path`` when the block ends without an error.

    Whatever happens, ``path`` is either whole or as it was. Every call has a temporary file of its own, beside
    ``path``, and removes no other. The new file gets the mode that this user's new files have.

    Raises:
        OSError: The folder does not exist or cannot be written to.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    part.touch(exist_ok=False)
    try:
        mode = part.stat().st_mode  # some writers make their files private
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def target_of(path: Path) -> Path | None:
    """The path that a temporary file of :func:`replacing` was to replace; None for any other file."""
    found = _TEMPORARY.fullmatch(path.name)
    return path.with_name(found["name"]) if found else None
