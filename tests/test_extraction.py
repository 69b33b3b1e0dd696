"""Folders of images -> files of features: what is in them, and that no accident spoils, loses or repeats anything."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.functional import to_tensor

import diffusion_backbones as db
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.extraction import MANIFEST, extract, images, stages
from diffusion_backbones.extraction.stages import Computer
from diffusion_backbones.ops import safetensors_io

PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
NAME = "tinysd_gdf"


@pytest.fixture(scope="module")
def backbone():
    return db.create_model(NAME, pretrained=True)


@pytest.fixture
def photos(tmp_path):
    """A folder of four pictures cut from the photograph: two sizes, one of them in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    photo = Image.open(PHOTO)
    for i, (name, size) in enumerate(
        [("a.jpg", (64, 48)), ("b.png", (64, 48)), ("c.jpg", (80, 64)), ("inner/a.jpg", (64, 48))]
    ):
        photo.crop((40 * i, 30 * i, 40 * i + size[0], 30 * i + size[1])).save(folder / name)
    return folder


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same features and say the same about them."""
    return one.read_bytes() == other.read_bytes()


def litter(folder: Path) -> list[Path]:
    """Whatever is neither a manifest nor a whole file of features."""
    return [
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST and (p.name.startswith(".") or p.suffix != ".safetensors")
    ]


def statuses(folder: Path) -> dict[str, str]:
    return {name: image["status"] for name, image in json.loads((folder / MANIFEST).read_text())["images"].items()}


# What is written.


def test_files_hold_the_pyramid_and_say_what_it_is(backbone, photos, tmp_path):
    out = tmp_path / "out"
    summary = extract(backbone, images.find([photos]), out)
    assert (summary.done, summary.skipped, summary.failed) == (4, 0, {})
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == [
        "a.jpg.safetensors",
        "b.png.safetensors",
        "c.jpg.safetensors",
        "inner/a.jpg.safetensors",
        "manifest.json",
    ]
    x = to_tensor(Image.open(photos / "c.jpg"))[None] * 2 - 1
    found = load_file(out / "c.jpg.safetensors")
    for i, level in enumerate(backbone(x)):
        assert torch.equal(found[f"level{i}"], level[0].half())
    said = metadata(out / "c.jpg.safetensors")
    assert said["backbone"] == NAME
    assert said["recipe_digest"] == backbone.declaration.recipe.digest
    assert json.loads(said["strides"]) == {"level0": 8, "level1": 16, "level2": 32}
    assert json.loads(said["original_size"]) == json.loads(said["input_size"]) == [64, 80]
    assert json.loads(said["weights"]) == backbone.provenance
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["backbone"], manifest["tag"], manifest["dtype"], manifest["size"]) == (NAME, "", "float16", None)
    assert manifest["weights"] == backbone.provenance
    assert manifest["recipe_digest"] == db.Recipe.from_dict(manifest["recipe"]).digest
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert statuses(out) == {name.removesuffix(".safetensors"): "done" for name in written[:-1]}


def test_a_size_means_what_timm_means(backbone, tmp_path):
    extract(backbone, images.find([PHOTO]), tmp_path / "out", size=64, dtype=torch.float32)
    config = resolve_model_data_config(backbone) | {"input_size": (3, 64, 64)}
    x = create_transform(**config)(Image.open(PHOTO).convert("RGB"))[None]
    found = load_file(tmp_path / "out" / "cat.jpg.safetensors")
    for i, level in enumerate(backbone(x)):
        assert torch.equal(found[f"level{i}"], level[0])
    said = metadata(tmp_path / "out" / "cat.jpg.safetensors")
    assert (json.loads(said["original_size"]), json.loads(said["input_size"])) == ([300, 451], [64, 64])


def test_batches_hold_images_of_one_size_and_change_nothing(backbone, photos, tmp_path, monkeypatch):
    shapes = []
    forward = DiffusionBackbone.forward
    monkeypatch.setattr(
        DiffusionBackbone,
        "forward",
        lambda self, x, *args, **kwargs: shapes.append(tuple(x.shape)) or forward(self, x, *args, **kwargs),
    )
    extract(backbone, images.find([photos]), tmp_path / "alone")
    assert [shape[0] for shape in shapes] == [1, 1, 1, 1]
    shapes.clear()
    extract(backbone, images.find([photos]), tmp_path / "together", batch_size=4)
    assert shapes == [(2, 3, 48, 64), (1, 3, 64, 80), (1, 3, 48, 64)]
    for path in (tmp_path / "alone").rglob("*.safetensors"):
        alone, together = load_file(path), load_file(tmp_path / "together" / path.relative_to(tmp_path / "alone"))
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-3)


def test_features_are_not_gathered(backbone, photos, tmp_path, monkeypatch):
    alive = []
    write = safetensors_io.write

    def counting(*args):
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
        write(*args)

    monkeypatch.setattr(safetensors_io, "write", counting)
    extract(backbone, images.find([photos]), tmp_path / "out", workers=0)
    assert len(alive) == 4
    assert max(alive) == alive[0], alive


# Reading, computing and writing at once.


@pytest.fixture
def strip(tmp_path):
    """A folder of 24 small pictures of one size."""
    folder = tmp_path / "strip"
    folder.mkdir()
    photo = Image.open(PHOTO)
    for i in range(24):
        photo.crop((4 * i, i, 4 * i + 40, i + 32)).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 3])
def test_threads_change_nothing(backbone, photos, tmp_path, batch_size, capsys):
    (photos / "b.png").write_text("no image")
    told = {}
    for workers in (0, 1, 3):
        out = tmp_path / f"out{workers}"
        summary = extract(backbone, images.find([photos]), out, batch_size=batch_size, workers=workers)
        told[workers] = (
            summary,
            json.loads((out / MANIFEST).read_text()),
            sorted(p.relative_to(out) for p in out.rglob("*")),
            capsys.readouterr(),
        )
        assert told[workers] == told[0]
        for path in (tmp_path / "out0").rglob("*.safetensors"):
            assert same(out / path.relative_to(tmp_path / "out0"), path)
    assert (told[0][0].done, list(told[0][0].failed)) == (3, ["b.png"])


def meet(monkeypatch, timeout: float) -> threading.Barrier:
    """Let the reading of image 4, the computing of image 1 and the writing of image 0 wait for each other."""
    barrier, calls = threading.Barrier(3, timeout=timeout), iter(range(1000))
    load, forward, write = images.load, DiffusionBackbone.forward, safetensors_io.write
    monkeypatch.setattr(
        images, "load", lambda path, *a: (barrier.wait() if path.name == "04.png" else None, load(path, *a))[1]
    )
    monkeypatch.setattr(
        DiffusionBackbone,
        "forward",
        lambda self, x: (barrier.wait() if next(calls) == 1 else None, forward(self, x))[1],
    )
    monkeypatch.setattr(
        safetensors_io,
        "write",
        lambda path, *args: (barrier.wait() if path.name.startswith("00.png") else None, write(path, *args))[1],
    )
    return barrier


def test_reading_computing_and_writing_happen_at_once(backbone, strip, tmp_path, monkeypatch):
    meet(monkeypatch, timeout=120)
    assert extract(backbone, images.find([strip])[:6], tmp_path / "out", workers=1).done == 6


def test_without_threads_one_thing_is_done_after_another(backbone, strip, tmp_path, monkeypatch):
    meet(monkeypatch, timeout=0.1)
    with pytest.raises(threading.BrokenBarrierError):
        extract(backbone, images.find([strip])[:6], tmp_path / "out", workers=0)


def test_a_slow_disk_stops_the_reading(backbone, strip, tmp_path, monkeypatch):
    batch_size, workers = 2, 3
    # Two batches are computed, one image more tells that the second is full, and the next batch and one for each worker
    # are read meanwhile.
    most = 2 * batch_size + 1 + batch_size + workers
    read, changed, seen = [], threading.Condition(), []
    load, write = images.load, safetensors_io.write

    def counting(path, *args):
        with changed:
            read.append(path.name)
            changed.notify_all()
        return load(path, *args)

    def slow(path, *args):
        if path.name.startswith("00.png"):
            with changed:
                seen.append(changed.wait_for(lambda: len(read) >= most, timeout=120))
            time.sleep(0.3)  # time to read on, if nothing held it
            seen.append(len(read))
        write(path, *args)

    monkeypatch.setattr(images, "load", counting)
    monkeypatch.setattr(safetensors_io, "write", slow)
    assert extract(backbone, images.find([strip]), tmp_path / "out", batch_size=batch_size, workers=workers).done == 24
    assert seen == [True, most]


def test_the_features_of_few_batches_are_in_memory(backbone, strip, tmp_path, monkeypatch):
    alive, most = set(), []
    compute, write = Computer.__call__, safetensors_io.write

    def counting(self, batch):
        output = compute(self, batch)
        key = batch[0].file.name
        alive.add(key)
        weakref.finalize(output.pyramid[0], alive.discard, key)
        most.append(len(alive))
        return output

    monkeypatch.setattr(Computer, "__call__", counting)
    monkeypatch.setattr(
        safetensors_io, "write", lambda *args: (time.sleep(0.08), write(*args))
    )  # slower than the network
    extract(backbone, images.find([strip]), tmp_path / "out", batch_size=2, workers=2)
    assert len(most) == 12
    assert 2 <= max(most) <= 3, most  # two, or a third that a thread has written and still holds


def fail_at(monkeypatch, where: str) -> None:
    """Let image 3 (batch 1 of two images each) fail in a way that is not the image's own."""
    forward, write, calls = DiffusionBackbone.forward, safetensors_io.write, iter(range(1000))

    def when(fails: bool, error: Exception) -> None:
        if fails:
            raise error

    if where == "compute":
        monkeypatch.setattr(
            DiffusionBackbone,
            "forward",
            lambda self, x: (when(next(calls) == 1, RuntimeError("broken")), forward(self, x))[1],
        )
    else:
        monkeypatch.setattr(
            safetensors_io,
            "write",
            lambda path, *args: (when(path.name.startswith("03.png"), OSError("broken")), write(path, *args))[1],
        )


@pytest.mark.parametrize(("where", "finished"), [("compute", 2), ("write", 3)])
def test_a_failing_stage_stops_all_and_loses_nothing(backbone, strip, tmp_path, monkeypatch, where, finished):
    out, files, before = tmp_path / "out", images.find([strip]), set(threading.enumerate())
    with monkeypatch.context() as patch:
        fail_at(patch, where)
        with pytest.raises(OSError if where == "write" else RuntimeError, match="broken"):
            extract(backbone, files, out, batch_size=2, workers=2)
    assert set(threading.enumerate()) == before, "a thread was left"
    assert litter(out) == []
    done = {path.name.removesuffix(".safetensors") for path in out.glob("*.safetensors")}
    assert done == {name for name, status in statuses(out).items() if status == "done"}
    assert {file.name for file in files[:finished]} <= done, "what had been computed was lost"
    assert len(done) <= 7, "it went on for more than the batches that were under way"
    again = extract(backbone, files, out, batch_size=2)
    assert (again.done, again.skipped) == (24 - len(done), len(done))


def test_values_are_not_read_before_they_have_arrived(backbone, strip, tmp_path, monkeypatch):
    """A device that answers late: its maps are zeros until somebody waits for them."""
    files, compute = images.find([strip])[:6], Computer.__call__
    extract(backbone, files, tmp_path / "prompt", batch_size=2)

    def late(self, batch):
        output = compute(self, batch)
        maps = [torch.zeros_like(level) for level in output.pyramid]
        return replace(
            output,
            pyramid=maps,
            arrived=lambda: [level.copy_(value) for level, value in zip(maps, output.pyramid, strict=True)],
        )

    monkeypatch.setattr(Computer, "__call__", late)
    extract(backbone, files, tmp_path / "late", batch_size=2)
    for file in files:
        assert same(tmp_path / "late" / f"{file.name}.safetensors", tmp_path / "prompt" / f"{file.name}.safetensors")


def test_what_a_gpu_is_asked_for(backbone, strip, tmp_path, monkeypatch):
    """Every image is pinned, every copy leaves the CPU free, and every batch is waited for: CUDA's calls, answered by
    the CPU.
    """
    files, asked = images.find([strip])[:6], []
    to = torch.Tensor.to

    class Stream:
        def record_event(self):
            return self

        def synchronize(self):
            asked.append("waited")

    def watched(self, *args, **kwargs):
        asked.extend(["copied"] if kwargs.get("non_blocking") else [])
        return to(self, *args, **kwargs)

    monkeypatch.setattr(stages, "_asynchronous", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    assert extract(backbone, files, tmp_path / "out", batch_size=2).done == 6
    assert {what: asked.count(what) for what in asked} == {"pinned": 6, "copied": 6 + 3 * 3, "waited": 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_is_written_before_it_has_arrived(strip, tmp_path):
    backbone, files = db.create_model(NAME, pretrained=True, device="cuda"), images.find([strip])
    extract(backbone, files, tmp_path / "out", size=256, dtype=torch.float32, workers=4)
    config = resolve_model_data_config(backbone) | {"input_size": (3, 256, 256)}
    for file in files:
        x = create_transform(**config)(Image.open(file.path).convert("RGB"))[None].cuda()
        found = load_file(tmp_path / "out" / f"{file.name}.safetensors")
        for i, level in enumerate(backbone(x)):
            assert torch.equal(found[f"level{i}"], level[0].cpu())


def test_upright_as_the_camera_was_held(photos, tmp_path):
    photo = Image.open(photos / "c.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to be shown
    photo.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert images.load(tmp_path / "turned.png").tobytes() == photo.convert("RGB").tobytes()


# What is found.


def test_hidden_files_and_other_files_are_no_images(photos):
    for name in (".hidden.jpg", "notes.txt", "inner/D.JPEG"):
        shutil.copy(photos / "a.jpg", photos / name)
    (photos / "inner" / "round").symlink_to(photos)
    assert [file.name for file in images.find([photos])] == ["a.jpg", "b.png", "c.jpg", "inner/D.JPEG", "inner/a.jpg"]


def test_two_images_of_one_name_are_refused(photos):
    assert len(images.find([photos / "a.jpg", photos])) == 4  # the same image twice
    with pytest.raises(ValueError, match=r"would both be kept as 'a\.jpg'"):
        images.find([photos / "a.jpg", photos / "inner" / "a.jpg"])


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.find([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no image"):
        images.find([tmp_path])


# What can go wrong with an image.


def test_broken_images_are_told_and_the_others_go_on(backbone, photos, tmp_path, capsys):
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:400])
    (photos / "b.png").write_text("no image")
    Image.new("I;16", (64, 48), 40000).save(photos / "deep.png")
    (photos / "empty.jpg").write_bytes(b"")
    out = tmp_path / "out"
    summary = extract(backbone, images.find([photos]), out, batch_size=2)
    assert summary.done == 2
    assert set(summary.failed) == {"a.jpg", "b.png", "deep.png", "empty.jpg"}
    assert "8 bits" in summary.failed["deep.png"]
    told = capsys.readouterr().err
    assert all(str(photos / name) in told for name in summary.failed)
    assert statuses(out) == {name: "failed" for name in summary.failed} | {"c.jpg": "done", "inner/a.jpg": "done"}
    Image.open(PHOTO).crop((0, 0, 64, 48)).save(photos / "a.jpg")  # repaired
    again = extract(backbone, images.find([photos]), out)
    assert (again.done, again.skipped, len(again.failed)) == (1, 2, 3)


def test_features_that_float16_cannot_hold_are_not_written(photos, tmp_path):
    backbone = db.create_model(NAME, pretrained=True)
    site = backbone.levels[1].sites[0]
    backbone.denoiser.get_submodule(site.path).weight.data.mul_(1e7)
    summary = extract(backbone, images.find([photos / "a.jpg"]), tmp_path / "out")
    assert "level1 has values that float16 cannot hold" in summary.failed["a.jpg"]
    assert not (tmp_path / "out" / "a.jpg.safetensors").exists()
    assert extract(backbone, images.find([photos / "a.jpg"]), tmp_path / "wide", dtype=torch.bfloat16).done == 1


def test_an_image_too_large_for_memory_is_told_and_the_others_go_on(backbone, photos, tmp_path, monkeypatch):
    forward = DiffusionBackbone.forward

    def small_device(self, x, *args, **kwargs):
        if x.shape[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(DiffusionBackbone, "forward", small_device)
    summary = extract(backbone, images.find([photos]), tmp_path / "out")
    assert summary.done == 3
    assert "does not fit the memory" in summary.failed["c.jpg"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": True}, "size must be an integer from 1 up, got True"),
        ({"size": "64"}, "size must be an integer"),
        ({"size": 0}, "size must be an integer"),
        ({"dtype": torch.int8}, r"dtype must be a torch.dtype of floating point, .* got torch.int8"),
        ({"dtype": torch.complex64}, "dtype must be"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"batch_size": 0}, "batch_size must be an integer from 1 up"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"workers": -1}, "workers must be an integer from 0 up, got -1"),
        ({"workers": "2"}, "workers must be"),
        ({"names": ["a"]}, "names must be 3 different texts, one for each map"),
        ({"names": ["a", "a", "b"]}, "names must be"),
        ({"names": "abc"}, "names must be"),
        ({"names": [1, 2, 3]}, "names must be"),
        ({"weights": "x"}, "weights must be a mapping"),
        ({"overwrite": "no"}, "overwrite must be True or False"),
        ({"max_pixels": 0}, "max_pixels must be"),
        ({"files": ["a.png"]}, r"files must be those that images.find\(\[...\]\) gives, got 'a.png'"),
        ({"backbone": NAME}, "extract takes a backbone from create_model"),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(backbone, photos, tmp_path, change, told):
    given = {"backbone": backbone, "files": images.find([photos]), "out": tmp_path / "out", **change}
    with pytest.raises((TypeError, ValueError), match=told):
        extract(**given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/a", "", "."])
def test_nothing_is_written_beside_the_folder(backbone, photos, tmp_path, name):
    [file, *_] = images.find([photos])
    with pytest.raises(ValueError, match="leads elsewhere"):
        extract(backbone, [images.ImageFile(file.path, name)], tmp_path / "out")
    with pytest.raises(ValueError, match="would both be kept as 'a'"):
        extract(backbone, [images.ImageFile(file.path, "a")] * 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Going on.


def test_what_is_finished_is_not_made_again(backbone, photos, tmp_path):
    out, files = tmp_path / "out", images.find([photos])
    extract(backbone, files[:2], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    summary = extract(backbone, files[1:], out)
    assert (summary.done, summary.skipped) == (2, 1)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert statuses(out) == {file.name: "done" for file in files}
    assert extract(backbone, files, out, overwrite=True).done == 4
    assert all(path.stat().st_mtime_ns > at for path, at in before.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 32}, "size was the images' own and is 32"),
        ({"dtype": torch.float32}, 'dtype was "float16" and is "float32"'),
        ({"names": ["level0", "level2", "level3"]}, "levels was"),
        ({"backbone": {"prompt": "a cat"}}, 'prompt was "" and is "a cat"'),
        ({"backbone": {"timestep": 7}}, "timestep was 51 and is 7"),
        ({"backbone": {"seed": 1}}, "recipe_digest was"),
        ({"backbone": {"name": "tinysd_legacy"}}, 'backbone was "tinysd_gdf" and is "tinysd_legacy"'),
    ],
)
def test_other_settings_never_share_a_folder(backbone, photos, tmp_path, change, told, capsys):
    out, files = tmp_path / "out", images.find([photos])
    extract(backbone, files[:2], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = change.pop("backbone", None)
    other = db.create_model(**{"name": NAME, "pretrained": True} | other) if other else backbone
    with pytest.raises(ValueError, match=told) as error:
        extract(other, files, out, **change)
    assert "--overwrite" in str(error.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    summary = extract(other, files[1:], out, overwrite=True, **change)
    assert summary.done == 3
    assert "whatever this call does not replace" in capsys.readouterr().err
    late = extract(other, files, out, **change)  # a.jpg is still of the old settings, and its own metadata says so
    assert (late.done, late.skipped) == (1, 3)


def test_half_written_files_are_not_finished_and_do_not_stay(backbone, photos, tmp_path):
    out, files = tmp_path / "out", images.find([photos])
    extract(backbone, files, out)
    shutil.copytree(out, tmp_path / "whole")
    whole = (out / "a.jpg.safetensors").read_bytes()
    (out / "a.jpg.safetensors").write_bytes(whole[:-100])
    (out / "inner" / ".diffusion_backbones-0123456789ab.part").write_bytes(whole[:100])
    summary = extract(backbone, files, out)
    assert (summary.done, summary.skipped) == (1, 3)
    assert same(out / "a.jpg.safetensors", tmp_path / "whole" / "a.jpg.safetensors")
    assert litter(out) == []


def test_a_folder_without_a_whole_manifest_is_left_alone(backbone, photos, tmp_path):
    out, files = tmp_path / "out", images.find([photos])
    extract(backbone, files, out)
    ours = '{"library_name": "diffusion_backbones", "images": 3}'
    for text, told in {"{": "is incomplete", "[]": "another program", ours: "is incomplete"}.items():
        (out / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=told):
            extract(backbone, files, out)
    (out / MANIFEST).unlink()
    assert extract(backbone, files, out).skipped == 4  # each file says itself by what it was made
    (out / MANIFEST).unlink()
    with pytest.raises(ValueError, match="is in the way"):
        extract(backbone, files, out, size=32)
    assert extract(backbone, files, out, size=32, overwrite=True).done == 4


# Accidents: real processes, real signals, a real full disk.


def start(photos: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "diffusion_backbones.cli",
        "extract",
        NAME,
        str(photos),
        "-o",
        str(out),
        "--device",
        "cpu",
    ]
    env = os.environ | dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads())
    )  # otherwise another number rounds the last digit

    def interruptible() -> None:  # a shell that runs tests in the background lets its children ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=interruptible
    )


def wait_for(process: subprocess.Popen[str], out: Path, n: int) -> None:
    """Until ``n`` files are finished."""
    end = time.monotonic() + 240
    while len(list(out.glob("*.safetensors"))) < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no features after four minutes"
        time.sleep(0.005)


def test_interrupted_and_killed_runs_go_on_where_they_stopped(backbone, tmp_path):
    photos, out, n = tmp_path / "photos", tmp_path / "out", 40
    photos.mkdir()
    photo = Image.open(PHOTO)
    for i in range(n):
        photo.crop((i, i, i + 128, i + 96)).save(photos / f"{i:02}.jpg")

    process = start(photos, out)
    wait_for(process, out, 3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    first = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "Interrupted. Finished images are kept: the same command goes on from here."
    assert "Traceback" not in told
    assert 3 <= len(first) < n
    assert litter(out) == []
    assert {name for name, status in statuses(out).items() if status == "done"} == {
        path.name.removesuffix(".safetensors") for path in first
    }

    process = start(photos, out)
    wait_for(process, out, len(first) + 3)
    process.kill()
    process.communicate()
    second = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(second) < n, "killed too late"

    summary = extract(backbone, images.find([photos]), out)
    assert (summary.done, summary.skipped) == (n - len(second), len(second)), "finished images were lost or repeated"
    assert all(path.stat().st_mtime_ns == at for path, at in {**second, **first}.items())
    assert set(statuses(out).values()) == {"done"}
    assert litter(out) == []
    extract(backbone, images.find([photos])[:8], tmp_path / "undisturbed")
    for path in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert same(out / path.name, path)


MOUNTS = """
import pathlib, shutil, subprocess, sys
from click.testing import CliRunner
from diffusion_backbones.cli import main

photos, full, read_only, copy = sys.argv[1:]
for folder, options in ((full, "size=100k"), (read_only, "ro")):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    command = ["extract", "tinysd_gdf", photos, "-o", folder, "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(main, command)
    print(result.exit_code, result.stderr.splitlines()[-1])
shutil.copytree(full, copy)
"""


def can_mount() -> bool:
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode
        == 0
    )


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces: `unshare -rm mount -t tmpfs tmpfs /mnt`")
def test_full_and_read_only_disks(photos, tmp_path):
    for i in range(8):
        shutil.copy(photos / "c.jpg", photos / f"more{i}.jpg")
    folders = [tmp_path / name for name in ("full", "read_only")]
    for folder in folders:
        folder.mkdir()
    copy = tmp_path / "copy"
    command = ["unshare", "-rm", sys.executable, "-c", MOUNTS, str(photos), *map(str, folders), str(copy)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "cache")}
    )
    assert result.returncode == 0, result.stderr
    full, read_only = result.stdout.splitlines()
    assert full.startswith("1 Error: ")
    assert "cannot be written" in full
    assert "No space left on device" in full
    assert read_only.startswith("1 Error: ")
    assert "Read-only file system" in read_only
    assert litter(copy) == []
    finished = list(copy.rglob("*.safetensors"))
    assert 0 < len(finished) < 12
    assert all(set(load_file(path)) == {"level0", "level1", "level2"} for path in finished)
    assert len(statuses(copy)) == 12


def test_a_folder_that_cannot_be_made(backbone, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made"):
        extract(backbone, images.find([photos]), tmp_path / "file" / "out")
