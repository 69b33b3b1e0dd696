"""A run with nothing to do ends before torch is imported, and only where nothing has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
from diffusers import AutoencoderTiny
from hub import Hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from safetensors import SafetensorError, safe_open
from test_hub import contents

import diffusion_backbones as db
from diffusion_backbones.cli.options import ModelOptions
from diffusion_backbones.extraction import MANIFEST, extract, images, rerun
from diffusion_backbones.extraction.rerun import Order, all_finished
from diffusion_backbones.ops.file_formats import safetensors_metadata

OPTIONS = asdict(ModelOptions(None, "cpu", None, False, None, None)) | {"size": 64, "dtype": "float16"}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 40 + i).convert("RGB").save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return db.create_model("tinysd_gdf", pretrained=True).save_pretrained(tmp_path_factory.mktemp("saved") / "saved")


def made(name: str, photos: Path, out: Path, **options) -> Order:
    """The order of a run that has made everything, as the command line makes it."""
    order = Order(name, OPTIONS | options)
    keywords = {key: options[key] for key in ("checkpoint_path", "encoder") if key in options}
    backbone = db.create_model(name, pretrained=True, **keywords)
    extract(backbone, images.find([photos]), out, size=64, order=order.note(backbone.provenance))
    return order


def done(name: str, photos: Path, out: Path, **options) -> bool:
    """Whether a run that begins now finds that all is finished."""
    return all_finished(Order(name, OPTIONS | options), images.find([photos]), out)


def test_a_command_that_finds_all_finished_imports_no_torch(photos, tmp_path):
    """What it prints and what it leaves are those of the run that loads the network."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, "extract", "tinysd_gdf", photos, "-o", out, "--size", "64"]
    first, again = (subprocess.run(list(map(str, command)), capture_output=True, text=True) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout == f"{out / MANIFEST}\n"
    assert first.stderr.splitlines() == ["2 extracted, 0 finished before, 0 failed", "True"]
    assert again.stderr.splitlines() == ["0 extracted, 2 finished before, 0 failed", "False"]


RUN = """
import sys
from diffusion_backbones.cli.program import main
main(sys.argv[1:], standalone_mode=False)
print("torch" in sys.modules or "numpy" in sys.modules, file=sys.stderr)
"""


def test_whatever_decides_the_settings_is_seen(photos, tmp_path, monkeypatch):
    name, out = "tinysd_gdf", tmp_path / "out"
    made(name, photos, out)
    assert done(name, photos, out)
    before = (out / MANIFEST).read_text()
    other = {"size": 32, "dtype": "float32", "levels": (0,), "prompt": "a cat", "timestep": 7, "encoder": "tiny"}
    for key, value in (other | {"random_weights": True, "device": "auto", "checkpoint_path": photos}).items():
        assert not done(name, photos, out, **{key: value}), key
    assert not done("tinysd_genpercept", photos, out)
    for key in ("CUDA_VISIBLE_DEVICES", "HF_HOME", "DIFFUSION_BACKBONES_CACHE"):
        with monkeypatch.context() as patch:
            patch.setenv(key, str(tmp_path))
            assert not done(name, photos, out), key
    for attribute, value in {"version": lambda _: "0", "_devices": lambda: ["nvidia0"]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(rerun, attribute, value)
            assert not done(name, photos, out), attribute
    copy = shutil.copytree(rerun.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rerun, "PACKAGE", copy)
    assert not done(name, photos, out), "another version of this package"
    assert (out / MANIFEST).read_text() == before, "nothing was touched"


def test_a_link_that_leads_nowhere_is_a_state_as_any_other(tmp_path, monkeypatch):
    """Editors leave such links beside the file that is edited."""
    (tmp_path / ".#module.py").symlink_to("nobody@nowhere:1")
    monkeypatch.setattr(rerun, "PACKAGE", tmp_path)
    with_link = Order("tinysd_gdf", OPTIONS).digest({})
    (tmp_path / ".#module.py").unlink()
    assert Order("tinysd_gdf", OPTIONS).digest({}) != with_link


def test_images_that_are_new_or_changed_are_seen(photos, tmp_path):
    name, out = "tinysd_gdf", tmp_path / "out"
    made(name, photos, out)
    kept = (out / "0.png.safetensors").read_bytes()
    for spoil in (
        lambda: (out / "0.png.safetensors").unlink(),
        lambda: (out / "0.png.safetensors").write_bytes(kept[:-10]),
        lambda: (out / "0.png.safetensors").write_bytes(b""),
        lambda: (out / "0.png.safetensors").write_bytes(kept.replace(b'"image":"', b'"image":"0', 1)),
        lambda: shutil.copy(photos / "1.png", photos / "0.png"),
        lambda: shutil.copy(photos / "0.png", photos / "2.png"),
    ):
        assert done(name, photos, out)
        image = (photos / "0.png").read_bytes()
        spoil()
        assert not done(name, photos, out)
        (out / "0.png.safetensors").write_bytes(kept)
        (photos / "0.png").write_bytes(image)
        (photos / "2.png").unlink(missing_ok=True)


def test_weights_that_were_replaced_are_seen_whatever_their_time(saved, photos, tmp_path):
    weights = shutil.copytree(saved, tmp_path / "weights")
    name, out = f"local-dir:{weights}", tmp_path / "out"
    made(name, photos, out)
    assert done(name, photos, out)
    file = weights / "model.safetensors"
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert not done(name, photos, out)
    shutil.copy(saved / "model.safetensors", file)
    assert not done(name, photos, out), "the same content at another time is for the run that compares contents"
    made(name, photos, out)
    assert done(name, photos, out), "which has found it equal, and noted that"
    (weights / "model.fp16.safetensors").write_bytes(b"")
    assert not done(name, photos, out), "a file that is new may be read in place of another"


def test_a_folder_in_the_diffusers_layout(tiny_folder, photos, tmp_path):
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "sd15")
    made("sd15_gdf", photos, tmp_path / "out", checkpoint_path=folder)
    assert done("sd15_gdf", photos, tmp_path / "out", checkpoint_path=folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert not done("sd15_gdf", photos, tmp_path / "out", checkpoint_path=folder)


def test_a_call_without_an_order_is_not_taken_for_one(photos, tmp_path):
    name, out = "tinysd_gdf", tmp_path / "out"
    made(name, photos, out)
    extract(db.create_model(name, pretrained=True), images.find([photos]), out, size=64)
    assert json.loads((out / MANIFEST).read_text())["order"] is None
    assert not done(name, photos, out)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"order": null}', '{"order": "0"}'])
def test_a_manifest_that_is_none_is_left_to_the_run_that_says_so(text, photos, tmp_path):
    assert not done("tinysd_gdf", photos, tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    assert not done("tinysd_gdf", photos, tmp_path)
    assert (tmp_path / MANIFEST).read_text() == text


# The hub.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "prompts"))
    yield hub
    hub.off()


def test_weights_on_the_hub_are_known_by_the_commit_of_the_branch(hub, tiny_folder, photos, tmp_path):
    name, out = "sd21_dift", tmp_path / "out"
    checkpoint = db.get_declaration(name).checkpoint
    hub.commit(checkpoint.hub_id, contents(tiny_folder(checkpoint.name)), commit=checkpoint.revision)
    made(name, photos, out)
    assert done(name, photos, out), "the first run downloaded, and the second has nothing to do"
    assert Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=checkpoint.hub_id, repo_type="model")).is_dir()
    hub.off()
    assert done(name, photos, out), "a commit is its own answer"
    [weights] = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/unet/diffusion_pytorch_model.safetensors")
    real = weights.resolve()
    real.write_bytes(real.read_bytes()[:-1] + b"0")
    assert not done(name, photos, out), "a file in the cache that was changed"


def test_a_branch_that_moved_is_seen(hub, tiny_folder, photos, tmp_path):
    """The tiny encoder's; where a hub cannot be asked, the cache says where the branch was."""
    name, out = "sd21_dift", tmp_path / "out"
    checkpoint = db.get_declaration(name).checkpoint
    whole = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    whole.save_pretrained(tmp_path / "taesd")
    encoder, files = checkpoint.tiny_encoder.file, contents(tmp_path / "taesd")
    hub.commit(checkpoint.hub_id, contents(tiny_folder(checkpoint.name)), commit=checkpoint.revision)
    hub.commit(encoder.repo, files, commit="a" * 40)
    made(name, photos, out, encoder="tiny")
    assert done(name, photos, out, encoder="tiny")
    hub.commit(encoder.repo, files | {"README.md": b"other"}, commit="b" * 40)
    assert not done(name, photos, out, encoder="tiny")
    hub.off()
    assert done(name, photos, out, encoder="tiny")


def test_what_came_from_another_place_than_was_asked_first_is_not_noted():
    order = Order("sd15_gdf", OPTIONS)
    repo = db.get_checkpoint("sd15").hub_id
    assert order.note({"repo": repo, "commit": "a"})
    assert order.note({"repo": "a/mirror", "commit": "a"}) is None
    assert order.note({"repo": repo, "commit": "a", "unet_repo": "b/c", "unet_commit": "b"}) is None
    completed = Order("sd15_gdf", OPTIONS | {"checkpoint_path": "weights.safetensors"})
    assert completed.note({"path": "weights.safetensors"})
    assert completed.note({"repo": repo, "commit": "a", "unet_path": "weights.safetensors"}) is None
    assert Order("hf-hub:a/b", OPTIONS).note({"repo": "a/b", "commit": "a"}) is None


# The header of a file, read without numpy.


def test_a_header_is_read_where_the_safetensors_library_opens_the_file(tmp_path):
    """The oracle is the library: what it opens is whole, what it refuses is not."""
    whole = tmp_path / "whole.safetensors"
    tiny.folder("ddpm_cifar10_32", tmp_path / "network")
    [stored] = (tmp_path / "network").glob("*.safetensors")
    data = stored.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = sorted(key for key in header if key != "__metadata__")[:2]

    def written(change) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    files = {
        "as it is": data,
        "with texts": written(lambda h: h.update(__metadata__={"image": "0", "settings": "ü"})),
        "without texts": written(lambda h: h.pop("__metadata__", None)),
        "cut": data[:-1],
        "longer": data + b"0",
        "a header alone": data[: 8 + length],
        "half a header": data[: 8 + length // 2],
        "empty": b"",
        "no safetensors": b"no safetensors at all",
        "a gap": written(lambda h: h.pop(first)),
        "twice the same bytes": written(lambda h: h[first].update(data_offsets=h[second]["data_offsets"])),
        "no offsets": written(lambda h: h[first].pop("data_offsets")),
        "a list": (2).to_bytes(8, "little") + b"[]",
        "nothing": (2).to_bytes(8, "little") + b"{}",
    }
    for what, content in files.items():
        whole.write_bytes(content)
        try:
            with safe_open(whole, framework="np") as file:
                expected = file.metadata() or {}
        except SafetensorError:
            with pytest.raises(ValueError, match="write it again"):
                safetensors_metadata(whole)
        else:
            assert safetensors_metadata(whole) == expected, what
    with pytest.raises(FileNotFoundError):
        safetensors_metadata(tmp_path / "nowhere")
