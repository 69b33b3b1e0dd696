"""save_pretrained: what is written, and that it loads back bit for bit with no text encoder and no hub."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import diffusion_backbones as db
from diffusion_backbones.ops import safetensors_io

X = torch.linspace(-1, 1, 3 * 40 * 64).view(1, 3, 40, 64).cos()
FILES = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def loaded(tiny_folder, tmp_path_factory):
    """``loaded("sd15_gdf")`` -> that backbone, from its tiny folder."""
    os.environ["DIFFUSION_BACKBONES_CACHE"] = str(tmp_path_factory.mktemp("prompts"))
    yield lambda name, **keywords: db.create_model(name, checkpoint_path=tiny_folder(name.split("_")[0]), **keywords)
    del os.environ["DIFFUSION_BACKBONES_CACHE"]


@pytest.fixture(scope="module")
def once(loaded, tmp_path_factory):
    return loaded("sd15_gdf").save_pretrained(tmp_path_factory.mktemp("once") / "saved")


@pytest.fixture(autouse=True)
def blank_card(once, monkeypatch):
    """Cards measure the network, which takes longer than all the rest; the one in ``once`` is real."""
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")


@pytest.fixture
def folder(once, tmp_path):
    """A folder that ``sd15_gdf`` was saved in, to be damaged."""
    return Path(shutil.copytree(once, tmp_path / "saved"))


def back(folder: Path, **keywords: Any) -> db.DiffusionBackbone:
    return db.create_model(f"local-dir:{folder}", **keywords)


def assert_same_state(a: db.DiffusionBackbone, b: db.DiffusionBackbone) -> None:
    for (name, p), (other, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert p.dtype == q.dtype, name
        assert torch.equal(p, q), name


def assert_same(a: db.DiffusionBackbone, b: db.DiffusionBackbone) -> None:
    assert_same_state(a, b)
    maps = a(X)
    assert maps
    for p, q in zip(maps, b(X), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["sd15_gdf", "sd21_dift", "sd21_genpercept", "sdxl_gdf"])
def test_a_round_trip_is_exact(name, loaded, tmp_path, monkeypatch):
    backbone = loaded(name)
    backbone.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(transformers.CLIPTextModel, "__init__", lambda *_: pytest.fail("a text encoder was built"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FILES
    again = back(tmp_path / "saved")
    assert again.declaration == backbone.declaration
    assert again.provenance == {"path": "local"}
    assert again.pretrained_cfg == backbone.pretrained_cfg
    assert_same(again, backbone)
    by_path = db.create_model(name, checkpoint_path=tmp_path / "saved")
    assert_same(by_path, backbone)


def test_only_what_was_kept_is_saved(loaded, tmp_path):
    backbone = loaded("sd15_gdf")
    folder = backbone.save_pretrained(tmp_path / "saved")
    assert folder == tmp_path / "saved"
    state = load_file(folder / "model.safetensors")
    assert set(state) == set(backbone.state_dict()) - {"canvas"}
    assert {name.split(".")[0] for name in state} == {"denoiser", "encoder", "conditioning"}
    assert not any(
        "up_blocks.3.resnets.1" in name or "decoder" in name or name.startswith("denoiser.conv_out") for name in state
    )


@pytest.mark.parametrize("how", ["out_indices", "prune"])
def test_a_round_trip_after_pruning(how, loaded, tmp_path):
    backbone = loaded("sd15_gdf", out_indices=[-1] if how == "out_indices" else None)
    if how == "prune":
        backbone.prune_intermediate_layers([2])
    again = back(backbone.save_pretrained(tmp_path / "saved"))
    assert again.declaration.recipe.levels == backbone.declaration.recipe.levels[-1:]
    assert len(again.levels) == 1
    assert_same(again, backbone)
    assert not any("up_blocks.2" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))


def test_levels_may_be_chosen_from_what_was_saved(loaded, folder):
    assert_same(back(folder, out_indices=[1, 2]), loaded("sd15_gdf", out_indices=[1, 2]))
    with pytest.raises(ValueError, match="indices must be different positions from -3 to 2"):
        back(folder, out_indices=[3])


def test_the_strides_that_were_asked_for_come_back_and_may_be_replaced(loaded, tmp_path):
    backbone = loaded("sd15_gdf", out_strides=(4, 8, 16, 32))
    folder = backbone.save_pretrained(tmp_path / "saved")
    assert_same(back(folder), backbone)
    assert back(folder).feature_info.reduction() == [4, 8, 16, 32]
    assert back(folder, out_strides=(8, 64)).feature_info.reduction() == [8, 64]
    backbone.prune_intermediate_layers([3])
    backbone.save_pretrained(folder)
    assert back(folder).feature_info.reduction() == [32]
    assert_same(back(folder), backbone)


def test_overrides_are_saved_and_cannot_be_changed_afterwards(loaded, tmp_path):
    backbone = loaded("sd15_gdf", timestep=7, seed=3, prompt="a cat")
    folder = backbone.save_pretrained(tmp_path / "saved")
    assert_same(back(folder), backbone)
    with pytest.raises(
        TypeError, match="a saved backbone keeps its recipe, and timestep would change it; give it per call"
    ):
        back(folder, timestep=3)
    with pytest.raises(TypeError, match="is a saved backbone with its own recipe; recipe= is for a diffusers folder"):
        back(folder, recipe=["mid-vit-out"])


def test_the_dtype_is_that_of_the_one_who_loads(loaded, tmp_path):
    half, full = loaded("sdxl_gdf", dtype=torch.float16), loaded("sdxl_gdf")
    folder = half.save_pretrained(tmp_path / "half")
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in stored.items() if name.startswith("encoder.")} == {torch.float32}
    assert {dtype for name, dtype in stored.items() if not name.startswith("encoder.")} == {torch.float16}
    assert_same_state(back(folder, dtype=torch.float16), half)
    assert {t.dtype for t in back(folder).state_dict().values()} == {torch.float32}
    full.save_pretrained(tmp_path / "full")
    assert_same_state(back(tmp_path / "full", dtype="float16"), half)


def test_on_meta_nothing_is_read(folder, tmp_path):
    backbone = back(folder, device="meta")
    assert {t.device.type for t in backbone.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match="sd15_gdf is on the meta device and has no weights to save"):
        backbone.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_training_goes_on_from_what_was_saved(loaded, tmp_path):
    backbone = loaded("sd15_gdf", trainable=True)
    with torch.no_grad():
        backbone.denoiser.conv_in.weight.add_(0.1)
    again = back(backbone.save_pretrained(tmp_path / "saved"), trainable=True)
    assert_same(again, backbone)
    again(X)[0].sum().backward()
    assert again.denoiser.conv_in.weight.grad is not None


def test_saving_over_what_was_loaded(folder):
    """The file that is read and the file that is written are one; a process that lost its mapping would die here."""
    backbone = back(folder)
    reference = [level.clone() for level in backbone(X)]
    for _ in range(2):
        backbone.save_pretrained(folder)
        assert all(torch.equal(p, q) for p, q in zip(backbone(X), reference, strict=True))
    with torch.no_grad():
        backbone.denoiser.conv_in.weight.mul_(2)
    backbone.save_pretrained(folder)
    assert_same(back(folder), backbone)
    assert {path.name for path in folder.iterdir()} == FILES


def test_provenance_survives_a_second_save(loaded, tmp_path):
    backbone = loaded("sd15_gdf")
    assert backbone.provenance["path"]
    second = back(backbone.save_pretrained(tmp_path / "first"))
    third = back(second.save_pretrained(tmp_path / "second"))
    assert third.provenance == {"path": "local"}
    assert json.loads((tmp_path / "second" / "config.json").read_text())["provenance"] == {"path": "local"}


def test_a_checkpoint_that_nobody_declared_round_trips(tiny_folder, tmp_path):
    backbone = db.create_model(f"local-dir:{tiny_folder('sd15')}", recipe=["up-level1-repeat2-res-out", "mid-vit-out"])
    again = back(backbone.save_pretrained(tmp_path / "saved"))
    assert again.declaration.recipe == backbone.declaration.recipe
    assert again.declaration.name == "my_unet_custom"
    assert_same(again, backbone)


def test_the_card_is_one_that_the_hub_reads(folder):
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusion_backbones"
    assert front["license"] == "creativeml-openrail-m"


def test_prompts_need_a_text_encoder_and_the_error_says_so(loaded, folder):
    backbone = back(folder)
    with pytest.raises(
        FileNotFoundError,
        match=r"prompt='a cat' needs a text encoder, and this backbone has none.*save_pretrained wrote",
    ):
        backbone(X, prompt="a cat")
    embeds = loaded("sd15_gdf").prompter(["a cat"])["prompt_embeds"]
    assert all(
        torch.equal(p, q)
        for p, q in zip(backbone(X, prompt_embeds=embeds), loaded("sd15_gdf")(X, prompt="a cat"), strict=True)
    )


def test_a_file_is_as_readable_as_its_folder_allows(loaded, tmp_path):
    old = os.umask(0o022)
    try:
        folder = loaded("sd15_gdf").save_pretrained(tmp_path / "saved")
    finally:
        os.umask(old)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(FILES, 0o644)


# What is refused.


def rewrite(folder: Path, **changes: Any) -> None:
    """Change ``config.json``; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_format_from_the_future_is_refused(folder):
    rewrite(folder, format=2)
    with pytest.raises(
        ValueError, match=rf"{folder}: config\.json has format 2 and this version reads 1; update diffusion_backbones"
    ):
        back(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": None}, "lacks 'recipe'"),
        ({"checkpoint": None}, "lacks 'checkpoint'"),
        ({"name": None}, "lacks 'name'"),
        ({"configs": None}, "lacks 'configs'"),
        ({"provenance": None}, "lacks 'provenance'"),
        ({"out_strides": None}, "lacks 'out_strides'"),
        ({"recipe": {"name": "gdf"}}, "recipe: it needs levels"),
        ({"recipe": {"levels": [["mid-vit-out"]], "nose": 1}}, r"recipe has no setting 'nose'\. Did you mean noise"),
        ({"recipe": 1}, "a recipe is a mapping of its settings, got int"),
        ({"checkpoint": []}, "has no attribute 'items'"),
    ],
)
def test_a_config_that_is_not_whole_is_refused(changes, said, folder):
    rewrite(folder, **changes)
    with pytest.raises(
        ValueError,
        match=rf"{folder}: config\.json is not what save_pretrained writes: .*{said}.*Save the backbone again",
    ):
        back(folder)


FIELDS = json.loads(
    '{"recipe": ["name", "levels", "timestep", "noise", "ensemble", "seed", "prompt", "prompt_padding", "scaled", '
    '"input_size", "paper", "nominal_timestep", "source", "notes", "unverified"], "checkpoint": ["name", "title", '
    '"hub_id", "license", "paper", "input_size", "family", "configs", "revision", "mirrors", "status", "gated", '
    '"denoiser", "encoder_float16", "unverified"]}'
)
"""What every folder of this format says, as the first version wrote it."""
LATER = {"recipe": ["without", "discard", "normalise"], "checkpoint": ["tiny_encoder"]}
"""What folders say since there is such a thing."""


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in FIELDS.items() for key in keys])
def test_no_default_stands_for_a_setting_that_is_missing(part, key, folder):
    config = json.loads((folder / "config.json").read_text())
    assert set(config[part]) == {*FIELDS[part], *LATER[part]}
    rewrite(folder, **{part: {name: value for name, value in config[part].items() if name != key}})
    with pytest.raises(ValueError, match=rf"config\.json is not what save_pretrained writes: .*\b{key}\b"):
        back(folder)


@pytest.mark.parametrize("key", LATER["recipe"])
def test_settings_that_came_together_are_missing_together(key, folder):
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    rewrite(folder, recipe={name: value for name, value in recipe.items() if name != key})
    with pytest.raises(ValueError, match=f"lacks 'recipe: {key}'"):
        back(folder)


def test_a_folder_of_an_early_version_is_read_and_told(once, folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    first = {part: {name: config[part][name] for name in names} for part, names in FIELDS.items()}
    rewrite(folder, **first)
    assert_same(back(folder), back(once))
    told = [record.message for record in caplog.records if "as early versions saved it" in record.message]
    assert len(told) == 2
    assert "its recipe has no discard, normalise, without" in told[0]
    assert "its checkpoint has no tiny_encoder" in told[1]


@pytest.mark.parametrize("input_format", ["imagenet", "uint8"])
def test_an_input_format_is_not_forgotten(input_format, loaded, tmp_path):
    """What timm reads in the same file says how images were normalized."""
    folder = loaded("sd15_gdf", input_format=input_format).save_pretrained(tmp_path / "saved")
    rewrite(folder, input_format=None)
    with pytest.raises(ValueError, match=r"is not what save_pretrained writes: lacks 'input_format'"):
        back(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{folder}: config\.json is not JSON"):
        back(folder)


def test_missing_and_broken_weights_are_named(folder):
    state = load_file(folder / "model.safetensors")
    weights = state.pop("denoiser.conv_in.weight")
    safetensors_io.write(folder / "model.safetensors", state, {})
    with pytest.raises(
        ValueError, match=rf"sd15_gdf denoiser: missing from {folder}/model\.safetensors: conv_in\.weight"
    ):
        back(folder)
    safetensors_io.write(
        folder / "model.safetensors", state | {"denoiser.conv_in.weight": weights, "encoder.foreign": torch.ones(1)}, {}
    )
    with pytest.raises(ValueError, match=r"sd15_gdf encoder: not part of this network, in .*: encoder.foreign"):
        back(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.safetensors is empty"):
        back(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        back(folder)


def test_a_name_with_another_recipe_is_refused(folder):
    with pytest.raises(
        ValueError,
        match=rf"{folder} was saved from sd15_gdf, whose recipe differs from that of sd15_legacy; use "
        r"create_model\('local-dir:",
    ):
        db.create_model("sd15_legacy", checkpoint_path=folder)


def test_a_saved_backbone_takes_no_other_weights(folder, tiny_folder):
    with pytest.raises(
        TypeError,
        match=r"sd15 is loaded from a saved backbone, which brings its weights; checkpoint_path='.*' would give others",
    ):
        back(folder, checkpoint_path=tiny_folder("sd15"))


def test_a_folder_that_cannot_be_made_is_an_oserror(loaded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        loaded("sd15_gdf").save_pretrained(tmp_path / "file" / "saved")


def test_a_disk_that_is_full_leaves_what_was_there(folder):
    """In a process whose files may not grow: the real writer fails in the middle, and the old folder still loads."""
    backbone = back(folder)
    script = f"""
import resource, signal, sys
import diffusion_backbones as db
backbone = db.create_model({f"local-dir:{folder}"!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    backbone.save_pretrained({str(folder)!r})
except OSError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"{folder}/model.safetensors cannot be written" in done.stderr
    assert done.returncode == 1
    assert_same(back(folder), backbone)
    assert {path.name for path in folder.iterdir()} == FILES, "a half-written file was left"


def test_the_config_is_written_last(loaded, tmp_path, monkeypatch):
    """A folder is known by its config, so one that was interrupted is not taken for whole."""
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loaded("sd15_gdf").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_random_weights_can_be_saved(tmp_path):
    torch.manual_seed(0)
    backbone = db.create_model("tinysd_gdf")
    assert_same(back(backbone.save_pretrained(tmp_path / "saved")), backbone)


def test_seeds_stand_for_the_noise(loaded, tmp_path):
    """The canvas of eight noises is not saved: its seed says it, and it comes back bit for bit."""
    backbone = loaded("sd21_dift")
    folder = backbone.save_pretrained(tmp_path / "saved")
    assert backbone.canvas.nbytes > 8_000_000
    assert "canvas" not in load_file(folder / "model.safetensors")
    assert torch.equal(back(folder).canvas, backbone.canvas)


def test_a_saved_sibling_of_another_size_keeps_its_architecture(tmp_path):
    folder = tiny.folder("sd15", tmp_path / "wide")
    network = tiny.build("sd15")["vae"]
    wide = type(network).from_config(dict(network.config) | {"block_out_channels": [16, 16, 32, 32]})
    wide.save_pretrained(folder / "vae")
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder)
    assert backbone.encoder.encoder.conv_in.out_channels == 16
    assert_same(back(backbone.save_pretrained(tmp_path / "saved")), backbone)


# In shards.


INDEX = "model.safetensors.index.json"


def shards_of(folder: Path) -> dict[str, list[str]]:
    """Shard -> names of its tensors, as the index says."""
    found: dict[str, list[str]] = {}
    for name, shard in json.loads((folder / INDEX).read_text())["weight_map"].items():
        found.setdefault(shard, []).append(name)
    return found


@pytest.fixture
def sharded(loaded, tmp_path):
    """A folder of five shards, to be damaged."""
    return loaded("sd15_gdf").save_pretrained(tmp_path / "sharded", max_shard_size="2MB")


def test_large_weights_are_saved_in_shards(loaded, once, sharded):
    shards = shards_of(sharded)
    assert sorted(shards) == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert {path.name for path in sharded.iterdir()} == FILES - {"model.safetensors"} | {INDEX, *shards}
    whole, stored = load_file(once / "model.safetensors"), {}
    for shard, names in shards.items():
        tensors = load_file(sharded / shard)
        assert set(tensors) == set(names)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2_000_000
        with safe_open(sharded / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        stored |= tensors
    assert all(torch.equal(stored.pop(name), tensor) for name, tensor in whole.items())
    assert not stored
    size = sum(tensor.nbytes for tensor in whole.values())
    assert json.loads((sharded / INDEX).read_text())["metadata"]["total_size"] == size
    assert (sharded / "config.json").read_text() == (once / "config.json").read_text()
    backbone = loaded("sd15_gdf")
    assert_same(back(sharded), backbone)
    assert_same(db.create_model("sd15_gdf", checkpoint_path=sharded), backbone)
    half = back(sharded, dtype="float16")
    assert_same_state(half, loaded("sd15_gdf", dtype="float16"))


def test_only_shards_with_needed_tensors_are_read(loaded, tmp_path):
    folder = loaded("sd15_gdf").save_pretrained(tmp_path / "saved", max_shard_size="500KB")
    one = loaded("sd15_gdf", out_indices=[-1])
    spare = [shard for shard, names in shards_of(folder).items() if not set(names) & set(one.state_dict())]
    assert spare
    for shard in spare:
        (folder / shard).unlink()
    assert_same(back(folder, out_indices=[-1]), one)
    with pytest.raises(FileNotFoundError, match=rf"{folder}: {INDEX} needs {spare[0]}, which is not there"):
        back(folder)


def test_broken_shards_are_named(sharded):
    first, second = sorted(shards_of(sharded))[:2]
    data = (sharded / first).read_bytes()
    (sharded / first).write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=rf"{sharded}/{first} \({len(data) - 1000} bytes\) is cut short"):
        back(sharded)
    state = load_file(sharded / second)
    (sharded / first).write_bytes(data)
    safetensors_io.write(sharded / second, dict(list(state.items())[1:]), {})
    with pytest.raises(ValueError, match=rf"missing from .*{second}.*: {next(iter(state)).partition('.')[2]}"):
        back(sharded)
    for text, said in [("{", "is not JSON"), ('{"weight_map": ["a"]}', "needs a 'weight_map' from tensors to files")]:
        (sharded / INDEX).write_text(text)
        with pytest.raises(ValueError, match=rf"{sharded}: {INDEX} .*{said}"):
            back(sharded)


def test_a_folder_that_is_saved_again_is_no_mixture(loaded, sharded):
    """Every change between one file, few shards and many; what others put there stays."""
    foreign = {"model-00001-of-00099.safetensors": b"another's", "notes.txt": b"a note"}
    for name, data in foreign.items():
        (sharded / name).write_bytes(data)
    for i, size in enumerate(("500KB", "5MB", "5GB", "4MB", "5GB", "5GB")):
        backbone = loaded("sd15_gdf", timestep=i, out_indices=[-1] if i % 2 else None)
        with torch.no_grad():
            backbone.denoiser.conv_in.weight.add_(i)
        backbone.save_pretrained(sharded, max_shard_size=size)
        weights = {INDEX, *shards_of(sharded)} if size != "5GB" else {"model.safetensors"}
        assert {path.name for path in sharded.iterdir()} == {"config.json", "README.md"} | foreign.keys() | weights
        assert_same(back(sharded), backbone)
    assert all((sharded / name).read_bytes() == data for name, data in foreign.items())


def test_weights_of_others_are_not_removed(loaded, tmp_path):
    """Shards of another library, with an index of its own: they stay, and are not taken for ours."""
    theirs = {INDEX: b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'}
    theirs["model-00001-of-00001.safetensors"] = b"another's"
    for name, data in theirs.items():
        (tmp_path / name).write_bytes(data)
    backbone = loaded("sd15_gdf")
    backbone.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_bytes() == data for name, data in theirs.items())
    assert_same(back(tmp_path), backbone)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"another's")
    (tmp_path / "saved").mkdir()
    index = {"metadata": {"library_name": "diffusion_backbones"}, "weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "saved" / INDEX).write_text(json.dumps(index))
    assert_same(back(backbone.save_pretrained(tmp_path / "saved")), backbone)
    assert outside.read_bytes() == b"another's"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b"not JSON"),
        ("model.safetensors", safetensors.torch.save({"bert.pooler.weight": torch.zeros(2)})),
        ("model.safetensors", b"not safetensors"),
    ],
)
def test_configs_and_weights_of_others_are_not_replaced(name, data, loaded, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileExistsError, match=rf"holds {re.escape(name)} of something else, .* another folder"):
        loaded("sd15_gdf").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: data}


def test_a_readme_of_others_stays(loaded, tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My project\n")
    backbone = loaded("sd15_gdf")
    for _ in range(2):
        assert_same(back(backbone.save_pretrained(tmp_path)), backbone)
        assert (tmp_path / "README.md").read_text() == "# My project\n"
        assert "README.md is not one of save_pretrained's and stays" in caplog.text
        caplog.clear()


def test_an_empty_place_is_not_this_folder(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the folder to save in is empty; name one, or '\.' for this one"):
        loaded("sd15_gdf").save_pretrained("")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import diffusion_backbones as db
old, *folders = map(Path, sys.argv[1:])
from diffusion_backbones.reports import costs
backbone = db.create_model(f"local-dir:{old}", out_indices=[-1])
measured = costs.measure(backbone.declaration, backbone.configs)
costs.measure = lambda *_: measured  # once for all: its card takes longer than the rest of a save
changes = 0
def until(limit, change):
    def changed(*args, **kwargs):
        global changes
        if changes == limit:
            os._exit(9)
        changes += 1
        return change(*args, **kwargs)
    return changed
for i, folder in enumerate(folders):
    if (child := os.fork()) == 0:
        Path.replace, Path.unlink = until(i, Path.replace), until(i, Path.unlink)
        backbone.save_pretrained(folder, max_shard_size="2MB")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_save_that_is_killed_between_two_files_leaves_nothing_that_can_be_read(loaded, sharded, tmp_path):
    """Before each change of the folder in turn: either it is as it was, or it says that it is not whole; never a
    mixture of the two saves. Saving again makes it whole, and leaves no shard of the killed one.
    """
    new, before = loaded("sd15_gdf", out_indices=[-1]), loaded("sd15_gdf")
    folders = [shutil.copytree(sharded, tmp_path / str(i), copy_function=os.link) for i in range(30)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(sharded), *map(str, folders)], capture_output=True, text=True, check=True
    )
    codes = [int(line) for line in done.stdout.split()]
    killed = codes.index(0)
    assert set(codes[:killed]) == {9}
    assert killed >= 1 + 5 + 2  # the config, five shards, and at least a new shard and the index
    assert_same(back(folders[0]), before)
    assert_same(back(folders[killed]), new)
    for folder in folders[1:killed]:
        if (folder / "config.json").exists():
            assert_same(back(folder), new)  # whole, and killed when temporary files were removed
            continue
        with pytest.raises(
            ValueError, match=rf"{folder} has weights and no config\.json, which save_pretrained writes"
        ):
            back(folder)
        with pytest.raises(ValueError, match="saving was interrupted"):
            db.create_model("sd15_gdf", checkpoint_path=folder)
    for folder in folders[1:killed:4]:
        new.save_pretrained(folder)
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == FILES
        assert_same(back(folder), new)


def test_tensors_that_share_memory_are_saved_each(loaded, tmp_path):
    backbone = loaded("sd15_gdf")
    by_shape: dict[torch.Size, list[str]] = {}
    for name, tensor in backbone.denoiser.named_parameters():
        by_shape.setdefault(tensor.shape, []).append(name)
    one, other = next(names for names in by_shape.values() if len(names) > 1)[:2]
    path, _, leaf = other.rpartition(".")
    setattr(backbone.denoiser.get_submodule(path), leaf, backbone.denoiser.get_parameter(one))
    embeds = backbone.conditioning.prompt_embeds
    backbone.conditioning.prompt_embeds = torch.cat([embeds, embeds], dim=1)[:, : embeds.shape[1]]  # a view
    for size in ("5GB", "500KB"):
        again = back(backbone.save_pretrained(tmp_path / size, max_shard_size=size))
        assert_same(again, backbone)
        assert torch.equal(again.denoiser.get_parameter(one), again.denoiser.get_parameter(other))


@pytest.mark.parametrize("size", ["much", "5XB", 0, -1])
def test_a_size_of_shards_that_cannot_be_is_refused(size, loaded, tmp_path):
    with pytest.raises(ValueError, match=rf"max_shard_size must be a number of bytes, or a string .* got {size!r}"):
        loaded("sd15_gdf").save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert not (tmp_path / "saved").exists()


# from_pretrained.


def test_from_pretrained_reads_a_folder(loaded, once, sharded):
    for folder in (once, str(once), sharded):
        assert_same(db.DiffusionBackbone.from_pretrained(folder), loaded("sd15_gdf"))
    few = db.DiffusionBackbone.from_pretrained(once, out_indices=[-1], dtype="float16", cache_dir=None)
    assert_same(few, loaded("sd15_gdf", out_indices=[-1], dtype="float16"))
    assert isinstance(few, db.DiffusionBackbone)


def test_from_pretrained_refuses_what_it_cannot_read(once, tiny_folder):
    with pytest.raises(TypeError, match=rf"revision='v1' is for repositories on the hub, and {once} is a folder"):
        db.DiffusionBackbone.from_pretrained(once, revision="v1")
    with pytest.raises(TypeError, match="create_model has no keyword 'out_indexes'. Did you mean out_indices"):
        db.DiffusionBackbone.from_pretrained(once, out_indexes=[1])
    for nothing in ("sd15_gdf", "/no/such/folder", "a/b/c", Path("me/mine")):
        with pytest.raises(FileNotFoundError, match=rf"'{nothing}' is neither a folder nor 'owner/repo' on the hub"):
            db.DiffusionBackbone.from_pretrained(nothing)
    with pytest.raises(TypeError, match="is not a saved backbone"):
        db.DiffusionBackbone.from_pretrained(tiny_folder("sd15"))


def test_copies_and_pickles_are_saved_alike(once, tmp_path):
    backbone = back(once)
    assert not [name for name in backbone.__dict__ if "hub" in name], "huggingface_hub left something in the module"
    for i, again in enumerate((copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)))):
        assert_same(back(again.save_pretrained(tmp_path / str(i))), backbone)
