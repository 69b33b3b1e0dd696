"""Releases on PyPI that cannot be installed beside the rest of the suite: fetched once into ``build``, and imported
from the folder.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"


def add(folder: str, requirement: str) -> None:
    """Put a source release on the path.

    Args:
        folder: That its archive unpacks to.
        requirement: As pip reads it, version and hash included.

    Raises:
        subprocess.CalledProcessError: pip did not get it.
    """
    path = BUILD / folder
    if not path.exists():
        _fetch(path, requirement)
    sys.path.insert(0, str(path))


def _fetch(path: Path, requirement: str) -> None:
    """Safe when two processes do it at once."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(requirement)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]  # some setups import torch
        subprocess.run([*pip, "--require-hashes", "--requirement", str(requirements), "--dest", scratch], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        with contextlib.suppress(OSError):  # the other process was first
            Path(scratch, path.name).rename(path)
