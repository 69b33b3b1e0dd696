"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffusion_backbones.ops import atomic, safetensors_io


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with atomic.replacing(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.parent == tmp_path
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
    with pytest.raises(FileNotFoundError, match=r"no/\.diffusion_backbones"):
        atomic.write_text(tmp_path / "no" / "a.txt", "")


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / ".diffusion_backbones-0123456789ab.part"
    left.write_bytes(b"half")
    others = [
        ".video.mp4.part",
        ".tmpAb3xYz",
        ".a.txt.0123456789ab.part",
        ".diffusion_backbones-0123456789ab.part.txt",
        ".diffusion_backbones-mine.part",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".diffusion_backbones-ba9876543210.part").mkdir()  # a folder
    (tmp_path / ".diffusion_backbones-aaaaaaaaaaaa.part").symlink_to(tmp_path / others[0])
    with atomic.replacing(tmp_path / "a.txt") as held:
        held.write_text("new")
        atomic.remove_left_over(tmp_path)
        assert held.exists(), "what another process writes now was removed"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not left.exists()
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert len(list(tmp_path.iterdir())) == len(others) + 3
    atomic.remove_left_over(tmp_path / "nowhere")


def test_a_temporary_name_is_as_long_for_every_file(tmp_path):
    lengths = set()
    for name in ("a", "b" * 255):
        with atomic.replacing(tmp_path / name) as part:
            lengths.add(len(part.name))
    assert len(lengths) == 1
    assert len(list(tmp_path.iterdir())) == 2


COUNT = """
import pathlib, sys
from diffusion_backbones.ops import atomic
path = pathlib.Path(sys.argv[1])
for _ in range(50):
    with atomic.holding(path.parent):
        atomic.write_text(path, str(int(path.read_text()) + 1))
"""


def test_of_several_processes_one_at_a_time_holds_a_folder(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert path.read_text() == "150"


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "folder"])
def test_an_output_that_is_an_input_is_refused(tmp_path, link):
    photo, out = tmp_path / "a.jpg", tmp_path / "b.jpg"
    photo.write_text("mine")
    if link == "same":
        out = photo
    elif link == "symbolic":
        out.symlink_to(photo)
    elif link == "hard":
        out.hardlink_to(photo)
    else:
        (tmp_path / "link").symlink_to(tmp_path)
        out = tmp_path / "link" / "a.jpg"
    with pytest.raises(ValueError, match="which is read"):
        atomic.check_output(out, [photo])
    atomic.check_output(tmp_path / "c.jpg", [photo])


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    metadata = {f"key {i} ü\n": str(i) for i in range(20)}
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)}
    for name in ("one", "two"):
        safetensors_io.write(tmp_path / name, tensors, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
