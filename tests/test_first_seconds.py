"""What a process does before its first features: which libraries it imports, and that garbage is collected again."""

from __future__ import annotations

import gc
import json
import os
import pty
import subprocess
import sys

import pytest

from diffusion_backbones.ops.large_libraries import stock, uncollected

STOCK = "import sys, torch; from diffusers import UNet2DConditionModel, AutoencoderKL, DDPMScheduler"
OURS = """
import json, sys, torch, diffusion_backbones as db
built = [db.create_model("tinysd_gdf", pretrained=True), db.create_model("sd15_gdf", checkpoint_path=sys.argv[1])]
assert len(built[0](torch.zeros(1, 3, 64, 64))) == len(built[1](torch.zeros(1, 3, 64, 64))) == 3
"""
MODULES = "\nimport json; print(json.dumps(sorted(sys.modules)))"
LIGHT = {"diffusion_backbones", "msgspec", "cython_runtime", "_cython_3_2_1", "_cython_3_1_3"}
"""What is imported beside the stock networks: our own modules, and the library that reads recipes."""


def modules(code: str, *arguments: object) -> set[str]:
    """The modules of a process of its own that ran some code."""
    command = [sys.executable, "-c", code + MODULES, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_first_features_import_what_the_stock_networks_do_and_hardly_more(tiny_folder):
    """The bound is what diffusers itself imports for the three classes. A prompt whose embedding is kept needs no
    text encoder, so the first call may not bring one.
    """
    subprocess.run([sys.executable, "-c", OURS, tiny_folder("sd15")], check=True)  # it keeps the embedded prompts
    expected, found = modules(STOCK), modules(OURS, tiny_folder("sd15"))
    more = {name for name in found - expected if name.partition(".")[0] not in LIGHT and not name.startswith("_")}
    assert not {name for name in more if name.partition(".")[0] not in sys.stdlib_module_names}, sorted(more)
    assert not found & {"timm", "sklearn", "matplotlib", "onnx", "torch._inductor.compile_fx"} - expected
    assert "transformers.models.clip.modeling_clip" not in found


@pytest.fixture
def nothing_frozen():
    """The tests freeze what was imported for them; where somebody has, importing leaves the collector alone."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_garbage_is_collected_again_and_what_was_imported_counts_as_old():
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner block leaves what the outer one began"
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), uncollected():
        raise ZeroDivisionError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled(), "whoever switched it off finds it off"
    finally:
        gc.enable()


@pytest.mark.usefixtures("nothing_frozen")
def test_cyclic_garbage_of_an_import_is_freed(tmp_path, monkeypatch):
    """Old objects are looked through by a full collection; frozen ones would never be."""
    (tmp_path / "brings_garbage.py").write_text(
        "import weakref\nclass Thing: pass\nthing = Thing()\nthing.itself = thing\nseen = weakref.ref(thing)\n"
        "del thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with uncollected():
        import brings_garbage
    gc.collect()
    assert brings_garbage.seen() is None


def test_frozen_objects_stay_frozen():
    code = """
import gc, sys
from diffusion_backbones.ops.large_libraries import uncollected
gc.freeze()
before = gc.get_freeze_count()
with uncollected():
    import decimal, fractions, statistics, xmlrpc.client
after = gc.get_freeze_count()  # a few are freed meanwhile
assert before - 100 < after <= before and gc.isenabled(), (before, after)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_stock_class_is_diffusers_own():
    import diffusers

    assert stock("UNet2DConditionModel") is diffusers.UNet2DConditionModel
    with pytest.raises(AttributeError, match="NoSuchModel"):
        stock("NoSuchModel")


@pytest.mark.parametrize("verb", ["extract", "visualize", "bench", "export", "select"])
def test_on_a_terminal_it_is_said_at_once_what_is_loaded(verb, tmp_path):
    """Before torch is imported: the process is ended as soon as it has said so."""
    photo = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "cat.jpg")
    rest = {"extract": [photo, "-o", "out"], "visualize": [photo, "-o", "a.png"], "export": ["-o", "a.pt2"]}
    name = "tinysd" if verb == "select" else "tinysd_gdf"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SAYING, verb, name, *rest.get(verb, ["-o", "out"] if verb == "select" else [])]
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=tmp_path
    ) as run:
        os.close(theirs)
        said = b""
        while b"\n" not in said:
            said += os.read(ours, 1000)
        assert said.decode().startswith(f"Loading {name} ..."), said
        run.kill()
    os.close(ours)


SAYING = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stderr.flush()
            print("torch is imported before anything is said", file=sys.stderr)
            sys.exit(3)
sys.meta_path.insert(0, NoTorch())
from diffusion_backbones.cli.program import main
main(sys.argv[1:])
"""
"""A program in which importing torch writes a line."""
