"""Tensors and facts in a folder of files of at most 15 MiB, so that a transfer of small files can take them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 15 * 2**20


def write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write all of it; what stood there stays until this is whole."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > LIMIT:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    for number, part in enumerate(parts):
        save_file(part, new / f"{number:02}.safetensors")
    (new / "facts.json").write_text(json.dumps({"files": len(parts), **facts}, indent=1) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts, or None where nothing was written.

    Raises:
        SystemExit: A file is missing or damaged.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # a write ended between its two renames
        old.rename(folder)
    if not (folder / "facts.json").is_file():
        return None
    facts = json.loads((folder / "facts.json").read_text())
    tensors: dict[str, Tensor] = {}
    for number in range(facts["files"]):
        path = folder / f"{number:02}.safetensors"
        try:
            tensors |= load_file(path)
        except Exception as error:  # safetensors raises its own kinds, and OSError
            raise SystemExit(f"{path} is missing or damaged: {error}. Copy it again, or delete {folder}.") from error
    return tensors, facts


def check(folder: Path, facts: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a state of another network.

    Raises:
        SystemExit: A fact of ``expected`` differs.
    """
    for key, value in expected.items():
        if facts.get(key) != value:
            raise SystemExit(
                f"{folder} is a state with {key} {facts.get(key)}, expected {value}. Name that with its option, or "
                "another folder."
            )
