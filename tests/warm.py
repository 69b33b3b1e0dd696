"""Code in a process of its own that need not import torch and torchvision first, which takes most of the time of a
process that a test starts.

For what is about other imports: torch is there already, nothing of timm, diffusers, transformers and this package is.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Below it, other than in its virtual environment, lies what single tests put on ``sys.path``."""
CONTEXT = multiprocessing.get_context("forkserver")  # a process that has one thread and forks one for each run
CONTEXT.set_forkserver_preload(["torch", "torchvision"])


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code as ``python -c`` does, with arguments; returns its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_execute, args=(code, args, paths))
        process.start()
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(path.read_text() for path in paths))


def _execute(code: str, args: tuple[str, ...], paths: list[Path]) -> None:
    for stream, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["-c", *args]
    sys.path[:] = [
        entry for entry in sys.path if not entry.startswith(f"{ROOT}{os.sep}") or entry.startswith(sys.prefix)
    ]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)
