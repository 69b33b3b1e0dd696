"""Extractions that are killed at any moment, or run twice at once, give what an undisturbed one gives, bit for bit.

Real processes and real signals. One process builds the backbone and forks a child for every run, so that a run costs
no start. ``EXTRACTION_KILLS=20`` kills as often.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

KILLS = int(os.environ.get("EXTRACTION_KILLS", "8"))
IMAGES = 24
PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
RUNS = """
import json, os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
import diffusion_backbones as db
from diffusion_backbones.extraction import extract, images

photos, root, kills = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
backbone = db.create_model("tinysd_gdf", pretrained=True)
files = images.find([photos])


def start(out):
    if pid := os.fork():
        return pid
    try:
        extract(backbone, files, root / out)
        os._exit(0)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)


def end(pid):
    return os.waitpid(pid, 0)[1]


began = time.monotonic()
found = {"whole": end(start("whole"))}
span, draw, left = time.monotonic() - began, random.Random(0), []
for i in range(kills):
    pid = start("killed")
    time.sleep(draw.uniform(0.05, 1) * span * 3 / kills)
    os.kill(pid, signal.SIGKILL)
    left.append([os.WIFSIGNALED(end(pid)), len(list((root / "killed").glob("**/*.safetensors")))])
found |= {"kills": left, "last": end(start("killed"))}
both = [start("twice"), start("twice")]
found["twice"] = [end(pid) for pid in both]
shards = images.find([photos])[::2], images.find([photos])[1::2]
files = shards[0]; one = start("shards")
files = shards[1]; other = start("shards")
found["shards"] = [end(one), end(other)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what became of them."""
    root = tmp_path_factory.mktemp("runs")
    (root / "photos" / "inner").mkdir(parents=True)
    photo = Image.open(PHOTO)
    for i in range(IMAGES):
        photo.crop((4 * i, i, 4 * i + 48, i + 32)).save(root / "photos" / ("inner" if i % 3 else "") / f"{i:02}.png")
    command = [sys.executable, "-c", RUNS, str(root / "photos"), str(root), str(KILLS)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["whole"] == 0, ran.stderr
    return root, found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_runs_go_on_to_what_an_undisturbed_run_gives(runs):
    root, found = runs
    assert found["last"] == 0
    killed = [count for was_killed, count in found["kills"] if was_killed]
    assert len(killed) >= KILLS // 2, f"too few were killed before they ended: {found['kills']}"
    assert killed == sorted(killed), "finished images were lost"
    whole = files(root / "whole")
    assert len(whole) == IMAGES + 1
    assert files(root / "killed") == whole  # every byte of features and manifest, and nothing half-written beside them


@pytest.mark.parametrize("how", ["twice", "shards"])
def test_two_at_once_give_what_one_gives(runs, how):
    root, found = runs
    assert found[how] == [0, 0]
    assert files(root / how) == files(root / "whole")
