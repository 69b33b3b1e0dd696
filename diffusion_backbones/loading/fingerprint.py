"""Files by their content, without reading large ones again at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from diffusion_backbones.ops import atomic

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$DIFFUSION_BACKBONES_CACHE``, or ``diffusion_backbones`` beside the hub's cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("DIFFUSION_BACKBONES_CACHE") or Path(HF_HOME) / "diffusion_backbones")


def content(path: Path) -> str:
    """24 hexadecimal digits that name the content of a file.

    Text encoders have gigabytes. So the digest is noted with the file's identity, size and times, the time at which it
    was last changed in any way among them, which no program can set: what is copied, unpacked or given old times is
    read again.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
    """
    real = path.resolve()
    stat = real.stat()
    seen = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = (
        cache_folder() / "files" / f"{hashlib.sha256(str(real).encode(errors='surrogateescape')).hexdigest()[:32]}.json"
    )
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_bytes())
        if known["seen"] == seen:
            return str(known["digest"])
    digest = _read(real)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(note, json.dumps({"seen": seen, "digest": digest}))
    except OSError as error:
        log.info("the digest of %s is not noted, so it is read again next time: %s", path, error)
    return digest


def _read(path: Path) -> str:
    found = hashlib.blake2b(digest_size=12)
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
