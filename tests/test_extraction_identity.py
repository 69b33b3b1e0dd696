"""What was made of another image, with other settings or weights, is never taken for finished; what was moved is."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusion_backbones as db
from diffusion_backbones.extraction import MANIFEST, extract, images
from diffusion_backbones.extraction.settings import weights_digest
from diffusion_backbones.selection import run as selection_run

NAME = "tinysd_gdf"
pytestmark = pytest.mark.usefixtures("one_thread", "costs_not_measured")


@pytest.fixture(scope="module")
def backbone():
    return db.create_model(NAME, pretrained=True)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.effect_noise((32, 32), 40 + i).convert("RGB").save(folder / f"{i}.png")
    return folder


def tuned(backbone):
    """The same backbone after a step of training, which no file knows of."""
    other = db.create_model(NAME, pretrained=True)
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(0.01)
    return other


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"out_indices": [0]}, "levels was"),
        ({"out_strides": (8, 16, 64)}, "strides was"),
        ({"out_strides": (4, 8, 16), "encoder_levels": True}, "activations was"),
        ({"dtype": "bfloat16"}, 'computed was ["float32", "float32"] and is ["bfloat16", "bfloat16"]'),
        ({"weight_dtype": "int8"}, "options was"),
        ({"fold": True}, "options was"),
        (None, "weights_digest was"),
    ],
)
def test_other_features_are_refused_by_name(backbone, photos, tmp_path, change, named):
    out, files = tmp_path / "out", images.find([photos])
    extract(backbone, files, out)
    other = tuned(backbone) if change is None else db.create_model(NAME, pretrained=True, **change)
    with pytest.raises(ValueError, match="holds features with other settings") as error:
        extract(other, files, out)
    assert named in str(error.value)


def test_which_level_is_told_apart_where_the_number_is_the_same(photos, tmp_path):
    out, files = tmp_path / "out", images.find([photos])
    extract(db.create_model(NAME, pretrained=True, out_indices=[0]), files, out)
    with pytest.raises(ValueError, match="activations was"):
        extract(db.create_model(NAME, pretrained=True, out_indices=[2]), files, out)


def test_weights_are_known_by_their_content(backbone, tmp_path):
    assert weights_digest(backbone) == weights_digest(db.create_model(NAME, pretrained=True))
    assert weights_digest(backbone) != weights_digest(tuned(backbone))
    saved = backbone.save_pretrained(tmp_path / "saved")
    shutil.move(saved, tmp_path / "moved")
    again = db.create_model(f"local-dir:{tmp_path / 'moved'}")
    assert weights_digest(again) == weights_digest(backbone), "weights that were moved are the same"


def test_a_selection_knows_weights_by_their_content(backbone):
    network = SimpleNamespace(checkpoint="tinysd", timestep=50, prompt="")
    settings = SimpleNamespace(network=network, seed=0, treatment=selection_run.Treatment())
    prepared = SimpleNamespace(size=64)
    nothing = SimpleNamespace(source="", images=[], task=SimpleNamespace(views=[]))
    one, other = (selection_run._key(settings, prepared, which, nothing) for which in (backbone, tuned(backbone)))
    assert [key for key in one if one[key] != other[key]] == ["weights_digest"]


def test_a_replaced_image_is_made_again_whatever_its_time(backbone, photos, tmp_path):
    out = tmp_path / "out"
    extract(backbone, images.find([photos]), out)
    path, before = photos / "0.png", (photos / "0.png").stat()
    data = bytearray(path.read_bytes())
    Image.effect_noise((32, 32), 90).convert("RGB").save(path)
    new = path.read_bytes()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bytes(data) != new
    summary = extract(backbone, images.find([photos]), out)
    assert (summary.done, summary.skipped) == (1, 1)
    extract(backbone, images.find([photos]), tmp_path / "fresh")
    assert (out / "0.png.safetensors").read_bytes() == (tmp_path / "fresh" / "0.png.safetensors").read_bytes()


def test_another_image_of_the_same_name_is_refused(backbone, photos, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    Image.effect_noise((32, 32), 90).convert("RGB").save(other / "0.png")
    extract(backbone, images.find([photos / "0.png"]), out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="is of another image") as error:
        extract(backbone, images.find([other / "0.png"]), out)
    assert str(photos / "0.png") in str(error.value)
    assert str(other / "0.png") in str(error.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert extract(backbone, images.find([other / "0.png"]), out, overwrite=True).done == 1
    shutil.copy(other / "0.png", tmp_path / "0.png")  # the same picture elsewhere is no other
    assert extract(backbone, images.find([tmp_path / "0.png"]), out).skipped == 1


def test_a_data_set_that_was_moved_is_recognized(backbone, photos, tmp_path):
    out = tmp_path / "out"
    extract(backbone, images.find([photos]), out)
    shutil.move(photos, tmp_path / "elsewhere")
    shutil.move(out, tmp_path / "features")
    for path in (tmp_path / "elsewhere").iterdir():
        path.touch()
    assert extract(backbone, images.find([tmp_path / "elsewhere"]), tmp_path / "features").skipped == 2


def test_the_same_input_gives_the_same_bytes(backbone, photos, tmp_path):
    for out in ("one", "two"):
        extract(backbone, images.find([photos]), tmp_path / out)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    said = (tmp_path / "one" / "0.png.safetensors").read_bytes()
    header = json.loads(said[8 : 8 + int.from_bytes(said[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert set(load_file(tmp_path / "one" / "0.png.safetensors")) == {"level0", "level1", "level2"}


# Files that are not ours.


def test_nothing_is_removed_or_replaced_that_others_made(backbone, photos, tmp_path):
    out = tmp_path / "out"
    theirs = [
        out / name for name in (".thesis.docx.part", "inner/.film.mkv.part", ".tmpNOTES1", ".0.png.safetensors.0a.part")
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (out / ".tmpabcdef").mkdir()
    left_over = out / ".diffusion_backbones-0123456789ab.part"  # of a run that was killed
    left_over.write_text("half")
    assert extract(backbone, images.find([photos]), out).done == 2
    assert [path.read_text() for path in theirs] == ["mine"] * 4
    assert (out / ".tmpabcdef").is_dir()
    assert not left_over.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_of_another_program_stays(backbone, photos, tmp_path, overwrite):
    (tmp_path / MANIFEST).write_text('{"name": "a web page", "images": {}}')
    with pytest.raises(ValueError, match="is of another program"):
        extract(backbone, images.find([photos]), tmp_path, overwrite=overwrite)
    assert json.loads((tmp_path / MANIFEST).read_text())["name"] == "a web page"


def test_a_file_in_the_way_stays(backbone, photos, tmp_path):
    out = tmp_path / "out"
    extract(backbone, images.find([photos / "0.png"]), out)
    (out / "1.png.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        extract(backbone, images.find([photos]), out)
    assert (out / "1.png.safetensors").read_text() == "mine"


def test_an_empty_name_is_no_folder(backbone, photos):
    with pytest.raises(ValueError, match="out is empty"):
        extract(backbone, images.find([photos]), "")


# Odd names cost one image at most.


@pytest.mark.parametrize(("stem", "fits"), [("a" * 236, True), ("b" * 251, False), ("猫" * 75, True)])
def test_long_names(backbone, photos, tmp_path, stem, fits):
    (photos / "1.png").rename(photos / f"{stem}.png")
    summary = extract(backbone, images.find([photos]), tmp_path / "out")
    assert summary.done == 1 + fits
    assert all("cannot be written" in told and "too long" in told for told in summary.failed.values())


def test_a_folder_in_the_way_costs_one_image(backbone, photos, tmp_path):
    (tmp_path / "out" / "0.png.safetensors").mkdir(parents=True)
    summary = extract(backbone, images.find([photos]), tmp_path / "out")
    assert (summary.done, list(summary.failed)) == (1, ["0.png"])
    assert "which is a folder" in summary.failed["0.png"]


def test_two_processes_with_other_settings_do_not_mix(backbone, photos, tmp_path, monkeypatch):
    """Between two images of the first, another begins with other settings; the first stops and says so."""
    from diffusion_backbones.extraction import folder

    out, files = tmp_path / "out", images.find([photos])
    monkeypatch.setattr(folder, "REFRESH", 0.0)
    load, begun = images.load, []

    def between(path, *args):
        if path.name == "1.png" and not begun:
            begun.append(True)
            with pytest.raises(ValueError, match="holds features with other settings"):
                extract(backbone, files, out, size=32)
            extract(backbone, files, out, size=32, overwrite=True)
        return load(path, *args)

    monkeypatch.setattr(images, "load", between)
    with pytest.raises(ValueError, match="another process has begun"):
        extract(backbone, files, out, workers=0)
    assert json.loads((out / MANIFEST).read_text())["size"] == 32
