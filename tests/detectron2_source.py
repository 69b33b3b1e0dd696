"""Importing this makes detectron2 importable: the one that is installed, or else a release from PyPI without its compiled operators.

detectron2 is not on PyPI under its own name. ``pb1-detectron2`` is release 0.6 without its C++ sources, which therefore cannot be
installed, but whose Python runs from a folder; ROIAlign and non-maximum suppression come from torchvision. It is fetched once, into ``build``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import PIL.Image

SDIST = "pb1-detectron2==0.6 --hash=sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
FOLDER = Path(__file__).parent.parent / "build" / "pb1-detectron2-0.6"


def fetch() -> None:
    """Download and unpack the release; safe when two processes do it at once."""
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(SDIST)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]      # its setup imports torch
        subprocess.run([*pip, "--require-hashes", "--requirement", str(requirements), "--dest", scratch], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        with contextlib.suppress(OSError):                              # the other process was first
            Path(scratch, FOLDER.name).rename(FOLDER)


if importlib.util.find_spec("detectron2") is None:
    if not FOLDER.exists():
        fetch()
    sys.path.insert(0, str(FOLDER))
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    PIL.Image.LINEAR = PIL.Image.BILINEAR                               # type: ignore[attr-defined]  # which the release still names, and Pillow dropped
