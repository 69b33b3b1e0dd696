"""Downloading and uploading, with the real huggingface_hub against a hub on the loopback interface."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import huggingface_hub
import pytest
import timm
import tiny
import torch
import transformers
from diffusers import AutoencoderTiny
from hub import GRANTED, Hub
from huggingface_hub import constants

import diffusion_backbones as db
from diffusion_backbones.loading import prompts

pytestmark = pytest.mark.usefixtures("costs_not_measured")

SD15, SD21, SDXL = (db.get_checkpoint(name) for name in ("sd15", "sd21", "sdxl"))
ID = "up-level1-repeat1-vit-out"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS = {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"}
TEXT = {
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
}
NOT_NEEDED = (
    "README.md",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/model.onnx",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub talks to, with nothing in its cache and no prompt in ours."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "prompts"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.off()


@pytest.fixture
def sd15(hub, tiny_folder) -> str:
    """Stable Diffusion 1.5's repository at its declared commit, with everything else that such a repository holds."""
    files = contents(tiny_folder("sd15"))
    hub.commit(SD15.hub_id, files | dict.fromkeys(NOT_NEEDED, b"not needed"), commit=SD15.revision)
    return SD15.hub_id


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a: db.DiffusionBackbone, b: db.DiffusionBackbone) -> bool:
    x = torch.linspace(-1, 1, 3 * 64 * 72).view(1, 3, 64, 72)
    return all(torch.equal(p, q) for p, q in zip(a(x), b(x), strict=True))


# What is downloaded.


def test_exactly_the_needed_files_are_downloaded(hub, sd15, tiny_folder):
    backbone = db.create_model("sd15_gdf", pretrained=True)
    assert hub.downloaded(sd15) == CONFIGS | TEXT | {f"unet/{WEIGHTS}", f"vae/{WEIGHTS}"}
    assert all(
        hub.sent[f"{sd15}/{name}"] == len(hub.repos[sd15].commits[SD15.revision][name]) for name in hub.downloaded(sd15)
    ), "a file was sent twice"
    assert backbone.provenance == {"repo": sd15, "commit": SD15.revision}
    assert equal(backbone, db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")))


def test_the_template_of_a_chat_belongs_to_a_tokenizer(hub, tiny_folder):
    checkpoint = db.get_checkpoint("z_image_turbo")
    hub.commit(checkpoint.hub_id, contents(tiny_folder("z_image_turbo")))
    backbone = db.create_model("z_image_turbo", recipe=["vit-block2-out"], pretrained=True)
    assert "tokenizer/chat_template.jinja" in hub.downloaded(checkpoint.hub_id)
    assert backbone.conditioning.prompt_attention_mask.sum() > 2, "the words of the chat"


@pytest.mark.parametrize(
    ("dtype", "published", "expected"),
    [
        (torch.float32, ("", ".fp16"), ""),
        (torch.float16, ("", ".fp16"), ".fp16"),
        (torch.bfloat16, ("", ".fp16"), ".fp16"),
        (torch.float16, ("",), ""),
        (torch.float32, (".fp16",), ".fp16"),
    ],
)
def test_the_variant_that_fits_the_dtype_is_downloaded(dtype, published, expected, hub, tiny_folder, caplog):
    files = contents(tiny_folder("sd15"))
    for name in ("unet", "vae"):
        weights = files.pop(f"{name}/{WEIGHTS}")
        files |= {f"{name}/diffusion_pytorch_model{variant}.safetensors": weights for variant in published}
    hub.commit(SD15.hub_id, files, commit=SD15.revision)
    db.create_model("sd15_gdf", pretrained=True, dtype=dtype)
    weights = {name for name in hub.downloaded(SD15.hub_id) if "pytorch_model" in name}
    assert weights == {f"{name}/diffusion_pytorch_model{expected}.safetensors" for name in ("unet", "vae")}
    assert ("float16 only" in caplog.text) == (dtype == torch.float32 and expected == ".fp16")


def test_an_encoder_that_stays_float32_gets_float32_weights(hub, tiny_folder):
    files = contents(tiny_folder("sdxl"))
    halves = {
        name.replace("model.safe", "model.fp16.safe"): data
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    hub.commit(SDXL.hub_id, files | halves, commit=SDXL.revision)
    backbone = db.create_model("sdxl_gdf", pretrained=True, dtype=torch.float16)
    assert {n for n in hub.downloaded(SDXL.hub_id) if "pytorch_model" in n} == {
        f"vae/{WEIGHTS}",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert next(backbone.encoder.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shards_are_downloaded_by_their_index(dtype, hub, tiny_folder, tmp_path):
    folder = tmp_path / "sharded"
    for variant in (None, "fp16"):
        tiny.folder("sd15", folder, max_shard_size="300KB", variant=variant)
    index = "unet/diffusion_pytorch_model.safetensors.index" + (".fp16.json" if dtype == torch.float16 else ".json")
    shards = {f"unet/{name}" for name in json.loads((folder / index).read_text())["weight_map"].values()}
    assert len(shards) > 2
    hub.add(SD15.hub_id, folder, commit=SD15.revision)
    backbone = db.create_model("sd15_gdf", pretrained=True, dtype=dtype)
    assert {n for n in hub.downloaded(SD15.hub_id) if n.startswith("unet/")} == shards | {index, "unet/config.json"}
    assert equal(backbone, db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), dtype=dtype))


def test_a_repository_of_pickles_is_refused(hub, tiny_folder):
    files = contents(tiny_folder("sd15"))
    files = {name.replace(".safetensors", ".bin"): data for name, data in files.items()}
    hub.commit(SD15.hub_id, files, commit=SD15.revision)
    with pytest.raises(
        FileNotFoundError, match=r"hf-hub:stable-diff.*/.*\.bin is a pickle.*runs whatever code.*Convert it once"
    ):
        db.create_model("sd15_gdf", pretrained=True)
    assert not any(name.endswith(".bin") for name in hub.downloaded(SD15.hub_id))


def test_a_prompt_that_is_known_needs_no_text_encoder(hub, sd15, monkeypatch, tmp_path):
    first = db.create_model("sd15_gdf", pretrained=True)
    shutil.rmtree(tmp_path / "hub")
    hub.forget()
    monkeypatch.setattr(transformers.CLIPTextModel, "__init__", lambda *_: pytest.fail("the text encoder was loaded"))
    second = db.create_model("sd15_gdf", pretrained=True)
    assert hub.downloaded(sd15) == CONFIGS | {f"unet/{WEIGHTS}", f"vae/{WEIGHTS}"}
    assert not any("text_encoder" in path or "tokenizer" in path for _, path in hub.requests)
    assert equal(first, second)


def test_on_meta_no_weight_is_downloaded(hub, sd15):
    backbone = db.create_model("sd15_gdf", pretrained=True, device="meta")
    assert hub.downloaded(sd15) == CONFIGS
    assert backbone.provenance["commit"] == SD15.revision


def test_another_start_asks_only_whether_the_repository_is_there(hub, sd15):
    db.create_model("sd15_gdf", pretrained=True)
    hub.forget()
    db.create_model("sd15_gdf", pretrained=True)
    assert hub.requests == [("GET", f"/api/models/{sd15}/revision/{SD15.revision}")]


def test_another_start_from_a_branch_asks_only_where_it_is(hub, tiny_folder):
    hub.add("me/mine", tiny_folder("sd15"))
    db.create_model("hf-hub:me/mine", recipe=[ID])
    hub.forget()
    db.create_model("hf-hub:me/mine", recipe=[ID])
    assert hub.requests == [("GET", "/api/models/me/mine/revision/main")]


# A denoiser from elsewhere.


def test_cleandift_takes_its_unet_from_its_own_repository(hub, sd15, tmp_path):
    cleandift = db.get_checkpoint("cleandift_sd15").denoiser
    tuned = tiny.build("sd15", seed=1)["unet"]
    tuned.save_pretrained(tmp_path / "tuned")
    commit = hub.commit(
        cleandift.repo, {cleandift.filename: (tmp_path / "tuned" / WEIGHTS).read_bytes(), "README.md": b""}
    )
    backbone = db.create_model("sd15_cleandift", pretrained=True)
    assert hub.downloaded(cleandift.repo) == {cleandift.filename}
    assert hub.downloaded(sd15) == CONFIGS | TEXT | {f"vae/{WEIGHTS}"}, "the U-Net that is replaced is not downloaded"
    assert backbone.provenance == {
        "repo": sd15,
        "commit": SD15.revision,
        "unet_repo": cleandift.repo,
        "unet_commit": commit,
    }
    torch.testing.assert_close(backbone.denoiser.conv_in.weight, tuned.conv_in.weight)
    assert torch.equal(next(backbone.encoder.parameters()), next(tiny.build("sd15")["vae"].parameters()))


def test_a_tiny_encoder_comes_from_its_own_repository(hub, sd15, tmp_path):
    file = SD15.tiny_encoder.file
    torch.manual_seed(0)
    whole = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    whole.save_pretrained(tmp_path / "published")
    commit = hub.add(file.repo, tmp_path / "published")
    with pytest.raises(ConnectionError, match="madebyollin/taesdxl is not on the hub"):
        db.create_model(
            "sdxl_gdf", pretrained=True, encoder="tiny", checkpoint_path=tiny.folder("sdxl", tmp_path / "sdxl")
        )
    backbone = db.create_model("sd15_gdf", pretrained=True, encoder="tiny")
    assert hub.downloaded(file.repo) == {"config.json", file.filename}
    assert hub.downloaded(sd15) == CONFIGS | TEXT | {f"unet/{WEIGHTS}"}, (
        "the encoder that is replaced is not downloaded"
    )
    assert backbone.provenance == {"repo": sd15, "commit": SD15.revision, "vae_repo": file.repo, "vae_commit": commit}
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(x), whole.encode(x).latents, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("decoder") for name in backbone.encoder.state_dict())


@pytest.mark.usefixtures("sd15")
def test_cleandift_on_meta_downloads_no_weight(hub):
    cleandift = db.get_checkpoint("cleandift_sd15").denoiser
    hub.commit(cleandift.repo, {cleandift.filename: b"not needed"})
    db.create_model("sd15_cleandift", pretrained=True, device="meta")
    assert not hub.downloaded(cleandift.repo)


def test_a_denoiser_that_is_published_alone_brings_its_config(hub, tmp_path):
    """PixArt-Sigma 512: VAE and T5 are those of 1024, the transformer and its config its own."""
    checkpoint = db.get_checkpoint("pixart_sigma_512")
    hub.commit(
        checkpoint.hub_id, contents(tiny.folder("pixart_sigma_1024", tmp_path / "base")), commit=checkpoint.revision
    )
    own = tiny.build("pixart_sigma_512", seed=5)["transformer"]
    own.save_pretrained(tmp_path / "own" / "transformer")
    hub.commit(checkpoint.denoiser.repo, contents(tmp_path / "own"), commit=checkpoint.denoiser.revision)
    backbone = db.create_model("pixart_sigma_512", recipe=["vit-block1-out"], pretrained=True)
    assert backbone.configs["transformer"]["sample_size"] == 64
    assert torch.equal(backbone.denoiser.pos_embed.proj.weight, own.pos_embed.proj.weight)
    assert backbone.conditioning.prompt_embeds.shape[1] == 300
    assert not any(
        name.startswith(f"{checkpoint.hub_id}/transformer/") and name.endswith(".safetensors") for name in hub.sent
    )


def test_a_denoiser_file_lies_on_the_published_rest(hub, sd15, tmp_path):
    tuned = tiny.build("sd15", seed=1)["unet"]
    tuned.save_pretrained(tmp_path / "tuned")
    backbone = db.create_model("sd15_gdf", pretrained=True, checkpoint_path=tmp_path / "tuned" / WEIGHTS)
    assert f"unet/{WEIGHTS}" not in hub.downloaded(sd15)
    assert torch.equal(backbone.denoiser.conv_in.weight, tuned.conv_in.weight)
    assert backbone.provenance == {
        "repo": sd15,
        "commit": SD15.revision,
        "unet_path": str(tmp_path / "tuned" / WEIGHTS),
    }


# Repositories that do not answer.


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_mirror_serves_for_a_removed_repository(token, hub, tiny_folder, caplog, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    commit = hub.add(SD21.mirrors[0], tiny_folder("sd21"))
    backbone = db.create_model("sd21_dift", pretrained=True)
    assert backbone.provenance == {"repo": SD21.mirrors[0], "commit": commit}
    [warning] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert SD21.hub_id in warning.getMessage()
    assert f"read from the mirror {SD21.mirrors[0]}, which nobody compared with the original" in warning.getMessage()


def test_mirrors_are_tried_in_order(hub, tiny_folder):
    first, second = db.get_checkpoint("sd21_base").mirrors
    hub.add(second, tiny_folder("sd21_base"))
    assert db.create_model("sd21_base", pretrained=True, recipe=[ID]).provenance["repo"] == second
    hub.add(first, tiny_folder("sd21_base"))
    assert db.create_model("sd21_base", pretrained=True, recipe=[ID]).provenance["repo"] == first


@pytest.mark.usefixtures("hub")
def test_a_repository_that_is_nowhere_is_explained():
    with pytest.raises(ConnectionError) as error:
        db.create_model("sd21_dift", pretrained=True)
    for said in ("sd21 cannot be downloaded", SD21.hub_id, SD21.mirrors[0], "removed or renamed", SD21.status):
        assert said in str(error.value)


def test_a_gated_repository_is_explained_and_opens_with_a_token(hub, tiny_folder, monkeypatch):
    hub.add(SD15.hub_id, tiny_folder("sd15"), commit=SD15.revision, gated=True)
    for token in (None, "hf_not_accepted"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            ConnectionError,
            match=f"{SD15.hub_id} is gated: accept its licence at {hub.url}/{SD15.hub_id} and log in with `hf auth "
            "login`",
        ):
            db.create_model("sd15_gdf", pretrained=True)
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    assert db.create_model("sd15_gdf", pretrained=True).provenance["repo"] == SD15.hub_id


def test_a_gated_transformer_is_explained_too(hub, tiny_folder):
    checkpoint = db.get_checkpoint("flux_dev")
    hub.add(checkpoint.hub_id, tiny_folder("flux_dev"), commit=checkpoint.revision, gated=True)
    with pytest.raises(
        ConnectionError,
        match=f"is gated: accept its licence at {hub.url}/{checkpoint.hub_id} and log in with `hf auth login`",
    ):
        db.create_model("flux_dev", recipe=["vit-block3-out"], pretrained=True)


def test_a_mirror_serves_for_a_gated_repository(hub, tiny_folder):
    hub.add(SD21.hub_id, tiny_folder("sd21"), commit=SD21.revision, gated=True)
    hub.add(SD21.mirrors[0], tiny_folder("sd21"))
    assert db.create_model("sd21_dift", pretrained=True).provenance["repo"] == SD21.mirrors[0]


def test_a_missing_revision_is_named(hub, tiny_folder):
    hub.add(SD15.hub_id, tiny_folder("sd15"))
    with pytest.raises(ConnectionError, match=f"has no revision '{SD15.revision}'"):
        db.create_model("sd15_gdf", pretrained=True)


@pytest.mark.parametrize(
    ("status", "said"), [(401, r"refuses access \(401\): check the token"), (503, "the hub answered 503")]
)
def test_a_hub_that_refuses_is_explained(status, said, hub):
    hub.failing = status
    with pytest.raises(ConnectionError, match=said):
        db.create_model("sdxl_gdf", pretrained=True)


@pytest.mark.usefixtures("hub", "sd15")
def test_a_file_that_cannot_be_downloaded_is_named(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(ConnectionError, match=r"unet/config\.json could not be downloaded.*No space left on device"):
        db.create_model("sd15_gdf", pretrained=True)


# Without network.


def test_without_network_the_second_start_works_and_is_quick(hub, sd15, caplog):
    first = db.create_model("sd15_gdf", pretrained=True)
    hub.off()
    start = time.monotonic()
    second = db.create_model("sd15_gdf", pretrained=True)
    assert time.monotonic() - start < 15, "it retried"
    assert second.provenance == first.provenance
    assert equal(first, second)
    assert f"{sd15} is read from the cache" in caplog.text


def test_without_network_a_branch_is_what_it_last_was(hub, tiny_folder):
    commit = hub.add("me/mine", tiny_folder("sd15"))
    first = db.create_model("hf-hub:me/mine", recipe=[ID])
    hub.off()
    second = db.create_model("hf-hub:me/mine", recipe=[ID])
    assert second.provenance == {"repo": "me/mine", "commit": commit}
    assert equal(first, second)


def test_a_branch_that_moved_is_followed_and_remembered(hub, tiny_folder, tmp_path):
    hub.add("me/mine", tiny_folder("sd15"))
    db.create_model("hf-hub:me/mine", recipe=[ID])
    new = hub.add("me/mine", tiny.folder("sd15", tmp_path / "new", seed=1))
    assert db.create_model("hf-hub:me/mine", recipe=[ID]).provenance["commit"] == new
    hub.off()
    assert db.create_model("hf-hub:me/mine", recipe=[ID]).provenance["commit"] == new


@pytest.mark.parametrize("how", ["off", "HF_HUB_OFFLINE", "503"])
@pytest.mark.usefixtures("sd15")
def test_without_network_and_cache_it_fails_quickly_and_says_why(how, hub, monkeypatch):
    if how == "off":
        hub.off()
    elif how == "503":
        hub.failing = 503
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = {
        "off": "the hub cannot be reached",
        "HF_HUB_OFFLINE": "HF_HUB_OFFLINE is set",
        "503": "the hub answered 503",
    }[how]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"sd15 cannot be downloaded.*{said}.*not in the cache"):
        db.create_model("sd15_gdf", pretrained=True)
    assert time.monotonic() - start < 15, "it retried"


def test_a_repository_that_was_removed_is_read_from_the_cache(hub, tiny_folder, caplog):
    hub.add(SD21.hub_id, tiny_folder("sd21"), commit=SD21.revision)
    hub.add(SD21.mirrors[0], tiny_folder("sd21"))
    db.create_model("sd21_dift", pretrained=True)
    del hub.repos[SD21.hub_id]
    assert db.create_model("sd21_dift", pretrained=True).provenance["repo"] == SD21.hub_id
    assert "removed or renamed" in caplog.text


@pytest.mark.usefixtures("sd15")
def test_what_the_cache_lacks_is_named_with_the_reason(hub):
    db.create_model("sd15_gdf", pretrained=True)
    hub.off()
    shutil.rmtree(prompts.cache_folder())
    [weights] = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/text_encoder/model.safetensors")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"only what is cached of it.*no text_encoder/model.safetensors"):
        db.create_model("sd15_gdf", pretrained=True)


def test_a_snapshot_that_others_downloaded_in_part_serves(hub, sd15):
    """diffusers downloads with patterns; huggingface_hub then knows that the snapshot is not whole, and by itself
    refuses it.
    """
    huggingface_hub.snapshot_download(sd15, revision=SD15.revision, allow_patterns=["unet/config.json"])
    db.create_model("sd15_gdf", pretrained=True)
    hub.off()
    assert db.create_model("sd15_gdf", pretrained=True).provenance["commit"] == SD15.revision


SCRIPT = """
import sys, time, logging
import diffusion_backbones as db
start = time.monotonic()
backbone = db.create_model("sd15_gdf", pretrained=True)
print(backbone.provenance["commit"], "transformers.models.clip.modeling_clip" in sys.modules, end=" ")
print(time.monotonic() - start < 40)
"""


@pytest.mark.usefixtures("sd15")
def test_a_process_of_its_own_with_the_environments_variables(hub, tmp_path):
    """HF_ENDPOINT and HF_HUB_OFFLINE are read when huggingface_hub is imported, so this is how users meet them."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PATH": "/usr/bin:/bin",
    }

    def start(**more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Loading weights" not in done.stderr
        return done.stdout.split()

    assert start() == [SD15.revision, "True", "True"]
    asked = len(hub.requests)
    assert start(HF_HUB_OFFLINE="1") == [SD15.revision, "False", "True"]
    assert len(hub.requests) == asked


# hf-hub: and push_to_hub.


def test_a_diffusers_repository_needs_a_recipe(hub, tiny_folder):
    hub.add("me/mine", tiny_folder("sd15"))
    with pytest.raises(TypeError, match=r"hf-hub:me/mine is not a saved backbone.*recipe="):
        db.create_model("hf-hub:me/mine")
    assert equal(
        db.create_model("hf-hub:me/mine", recipe=[ID]),
        db.create_model("sd15", recipe=[ID], checkpoint_path=tiny_folder("sd15")),
    )


def test_a_revision_is_taken_from_the_name(hub, tiny_folder, tmp_path):
    old = hub.add("me/mine", tiny_folder("sd15"))
    hub.add("me/mine", tiny.folder("sd15", tmp_path / "new", seed=1))
    branch = hub.add("me/mine", tiny.folder("sd15", tmp_path / "branch", seed=2), revision="refs/pr/3")
    for revision, commit in ((old, old), ("refs/pr/3", branch)):
        assert db.create_model(f"hf-hub:me/mine@{revision}", recipe=[ID]).provenance == {
            "repo": "me/mine",
            "commit": commit,
        }
    with pytest.raises(ConnectionError, match="me/mine has no revision 'nowhere'"):
        db.create_model("hf-hub:me/mine@nowhere", recipe=[ID])


def test_push_creates_a_repository_of_three_files_that_loads_back(hub, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    url = backbone.push_to_hub("me/mine")
    assert url == f"{hub.url}/me/mine"
    assert set(hub.repos["me/mine"].commits[hub.repos["me/mine"].refs["main"]]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    hub.forget()
    again = db.create_model("hf-hub:me/mine")
    assert hub.downloaded("me/mine") == {"config.json", "model.safetensors"}
    assert again.declaration == backbone.declaration
    assert again.provenance == {"path": "local"}
    assert equal(again, backbone)
    assert equal(timm.create_model("hf-hub:me/mine"), backbone)
    backbone.prune_intermediate_layers([0])
    backbone.push_to_hub("me/mine", commit_message="Less")
    assert len(db.create_model("hf-hub:me/mine").levels) == 1
    hub.off()
    assert len(db.create_model("hf-hub:me/mine").levels) == 1


@pytest.mark.usefixtures("hub")
def test_what_was_downloaded_is_recorded_where_it_is_saved(sd15, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    db.create_model("sd15_gdf", pretrained=True).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["provenance"] == {
        "repo": sd15,
        "commit": SD15.revision,
    }


def test_a_private_repository_stays_private(hub, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")).push_to_hub("me/mine", private=True)
    assert hub.repos["me/mine"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConnectionError, match=r"me/mine is not on the hub.*private and needs `hf auth login`"):
        db.create_model("hf-hub:me/mine")


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_other", 403)])
def test_a_push_without_rights_says_so_and_uploads_nothing(token, status, hub, tiny_folder):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    with pytest.raises(
        ConnectionError, match=rf"nothing was uploaded: me/mine refuses access \({status}\): check the token"
    ):
        backbone.push_to_hub("me/mine", token=token)
    assert not hub.repos


def names(hub: Hub, revision: str = "main") -> set[str]:
    repo = hub.repos["me/mine"]
    return set(repo.commits[repo.refs[revision]])


def test_shards_are_pushed_and_only_those_that_are_needed_are_downloaded(hub, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    backbone.push_to_hub("me/mine", max_shard_size="500KB")
    shards = {name for name in names(hub) if name.startswith("model-")}
    assert names(hub) - shards == {".gitattributes", "README.md", "config.json", "model.safetensors.index.json"}
    hub.forget()
    one = db.DiffusionBackbone.from_pretrained("me/mine", out_indices=[-1])
    first = hub.downloaded("me/mine")
    assert first < shards | {"config.json", "model.safetensors.index.json"}
    assert equal(one, db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), out_indices=[-1]))
    hub.off()
    assert equal(db.DiffusionBackbone.from_pretrained("me/mine", out_indices=[-1]), one)
    with pytest.raises(FileNotFoundError, match=r"only what is cached of it.*needs model-\d{5}-of-\d{5}\.safetensors"):
        db.DiffusionBackbone.from_pretrained("me/mine")


def test_a_push_removes_the_weights_of_an_earlier_one_and_nothing_else(hub, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    foreign = {"model-00001-of-00001.safetensors": b"another's", "notes.txt": b"a note", ".gitattributes": b""}
    hub.commit("me/mine", foreign)
    backbone.push_to_hub("me/mine", max_shard_size="2MB")
    assert len(names(hub)) == len(foreign) + 3 + 5
    backbone.push_to_hub("me/mine")
    assert names(hub) == foreign.keys() | {"README.md", "config.json", "model.safetensors"}
    assert equal(db.DiffusionBackbone.from_pretrained("me/mine"), backbone)
    backbone.push_to_hub("me/mine", max_shard_size="2MB")
    assert "model.safetensors" not in names(hub)
    assert equal(db.DiffusionBackbone.from_pretrained("me/mine"), backbone)


def test_a_branch_and_a_pull_request(hub, tiny_folder):
    one = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), out_indices=[-1])
    two = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), out_indices=[-1], timestep=7)
    for _ in range(2):  # the branch is there, the second time
        assert one.push_to_hub("me/mine", token=GRANTED, revision="trial") == f"{hub.url}/me/mine"
    assert names(hub) == {".gitattributes"}
    url = two.push_to_hub("me/mine", token=GRANTED, create_pr=True)
    assert url == f"{hub.url}/me/mine/discussions/1"
    for revision, pushed in (("trial", one), ("refs/pr/1", two)):
        again = db.DiffusionBackbone.from_pretrained("me/mine", revision=revision)
        assert again.declaration.recipe.timestep == pushed.declaration.recipe.timestep
        assert equal(again, pushed)
    with pytest.raises(ConnectionError, match="me/mine has no revision 'nowhere'"):
        db.DiffusionBackbone.from_pretrained("me/mine", revision="nowhere")


def test_a_token_reads_a_private_repository_and_is_not_kept(hub, tiny_folder):
    hub.commit("me/mine", contents(tiny_folder("sd15")), private=True)
    for wrong in (None, "hf_other"):
        with pytest.raises(ConnectionError, match="me/mine is not on the hub.*private"):
            db.DiffusionBackbone.from_pretrained("me/mine", recipe=[ID], token=wrong)
    backbone = db.DiffusionBackbone.from_pretrained("me/mine", recipe=[ID], token=GRANTED)
    assert backbone.provenance["repo"] == "me/mine"
    x = torch.zeros(1, 3, 64, 64)
    copy = deepcopy(backbone)
    shutil.rmtree(constants.HF_HUB_CACHE)
    expected = copy(x, prompt="a cat")  # fetches the text encoder, with the token
    stored = pickle.dumps(backbone)
    assert GRANTED.encode() not in stored
    shutil.rmtree(constants.HF_HUB_CACHE)
    shutil.rmtree(prompts.cache_folder())
    with pytest.raises(ConnectionError, match="private"):
        pickle.loads(stored)(x, prompt="a cat")
    assert torch.equal(backbone(x, prompt="a cat")[0], expected[0])
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(ConnectionError, match="private"):  # nor does it outlive the call
        db.create_model("hf-hub:me/mine", recipe=[ID])


def test_local_files_only_asks_nobody(hub, tiny_folder, tmp_path):
    hub.add("me/mine", tiny_folder("sd15"))
    keywords = {"recipe": [ID], "cache_dir": tmp_path / "elsewhere"}
    with pytest.raises(ConnectionError, match=r"me/mine: local_files_only=True; revision 'main' of it is not in the"):
        db.DiffusionBackbone.from_pretrained("me/mine", local_files_only=True, **keywords)
    assert not hub.requests
    first = db.DiffusionBackbone.from_pretrained("me/mine", **keywords)
    hub.forget()
    assert equal(db.DiffusionBackbone.from_pretrained("me/mine", local_files_only=True, **keywords), first)
    assert not hub.requests
    assert not Path(constants.HF_HUB_CACHE).exists()
