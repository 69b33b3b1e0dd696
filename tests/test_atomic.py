"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_backbones.extraction.folder import Folder, Settings
from diffusion_backbones.ops import atomic, safetensors_io


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with atomic.replacing(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.parent == tmp_path
        assert atomic.target_of(part) == path
    assert path.read_text() == "new"
    atomic.write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert litter(tmp_path) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic.replacing(path) as part:
            part.write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert litter(tmp_path) == []


def test_two_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic.replacing(path) as one, atomic.replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # that of the block that ended last
    assert litter(tmp_path) == []


def test_temporary_files_of_others_are_left(tmp_path):
    other = tmp_path / ".a.txt.0123456789ab.part"
    other.write_text("of another process")
    atomic.write_text(tmp_path / "a.txt", "mine")
    assert other.read_text() == "of another process"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_mode_is_that_of_new_files(umask, mode, tmp_path):
    old = os.umask(umask)
    try:
        atomic.write_text(tmp_path / "a.txt", "")
        safetensors_io.write(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})  # whose own files are private
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/\.a\.txt"):
        atomic.write_text(tmp_path / "no" / "a.txt", "")


@pytest.mark.parametrize("name", ["a.txt", ".part", ".a.part", "a.txt.0a.part", ".a.txt.0a.part.txt", ".a.txt.0G.part"])
def test_other_files_are_no_temporary_ones(name):
    assert atomic.target_of(Path(name)) is None


FOREIGN: dict[str, Any] = {
    ".video.mp4.part": b"a download",
    ".video.mp4.0a.part": b"a download",
    ".tmpfolder/file": b"a file",
    ".tmpabcdef/file": b"a folder with the name of a temporary file",
    ".tmpAb3xYz": b"a file that is not in the safetensors format",
    "inner/.tmp123456": b"",
    ".a.jpg.safetensors.0a.part/file": b"a folder with the name of a temporary file",
}


def test_an_extraction_removes_its_own_temporary_files_and_no_others(tmp_path):
    for name, data in FOREIGN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    safetensors_io.write(tmp_path / "whole", {"a": torch.ones(100)}, {"settings": "x"})
    half = (tmp_path / "whole").read_bytes()[:100]
    (tmp_path / "whole").unlink()
    for name in (
        ".a.jpg.safetensors.0123456789ab.part",
        "inner/.b.safetensors.123.part",
        ".manifest.json.77.part",
        ".tmp0aB9xY",
    ):
        (tmp_path / name).write_bytes(half)
    settings = Settings("a", "", {}, "", "", 50.0, ("level0",), None, "float32")
    Folder(tmp_path, settings, {}, overwrite=False).begin([], [])
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == FOREIGN.keys() | {"manifest.json"}
