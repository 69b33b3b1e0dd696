"""Prompts: what they are turned into, that it is done once, and what happens when it cannot be."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion_backbones as db
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.families.text import clip
from diffusion_backbones.loading import prompts
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.loading.source import Folder

X = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64).cos()
PROMPTS = ["", "a cat", "a photograph of a horse on a beach, 35 mm", "Ünïcödé ☃"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def built(monkeypatch) -> list[Any]:
    """Weak references to every text model that is built from here on."""
    models: list[Any] = []
    build = clip.text_model

    def watched(*args: Any) -> Any:
        model = build(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(clip, "text_model", watched)
    return models


def prompter(folder: Path, padding: str = "max_length") -> Prompter:
    source = Folder(folder)
    family = prompts.FAMILIES[db.get_checkpoint("sd15").family]
    return Prompter(family(source.configs(family)), source, padding)


# What they are.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_embeddings_are_those_of_diffusers_pipeline(name, prompt, tiny_folder):
    folder = tiny_folder(name)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    ours = prompter(folder)([prompt])
    assert set(ours) == {"prompt_embeds"}
    torch.testing.assert_close(ours["prompt_embeds"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_those_of_diffusers_xl_pipeline(prompt, tiny_folder):
    folder = tiny_folder("sdxl")
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    )
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    ours = prompter(folder)([prompt])
    assert set(ours) == {"prompt_embeds", "pooled_prompt_embeds"}
    torch.testing.assert_close(ours["prompt_embeds"], embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


def test_longest_padding_leaves_a_prompt_as_long_as_it_is(tiny_folder):
    folder = tiny_folder("sd15")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for prompt in PROMPTS:
        short, full = (
            prompter(folder, "longest")([prompt])["prompt_embeds"],
            prompter(folder)([prompt])["prompt_embeds"],
        )
        n = len(tokenizer(prompt).input_ids)
        assert short.shape[1] == n
        assert full.shape[1] == 77
        torch.testing.assert_close(
            short, full[:, :n], rtol=1e-5, atol=1e-5
        )  # attention is causal: padding changes nothing before it
    assert prompter(folder, "longest")([""])["prompt_embeds"].shape[1] == 2


def test_longest_padding_reaches_the_backbone(tiny_folder):
    backbone = db.create_model("sd21_genpercept", checkpoint_path=tiny_folder("sd21"))
    assert backbone.conditioning.prompt_embeds.shape[1] == 2
    assert len(backbone(X[:1], prompt="a cat")) == 4


def test_prompts_of_different_lengths_are_not_mixed_unless_padded(tiny_folder):
    prompts = ["a cat", "a very large cat"]
    with pytest.raises(
        ValueError,
        match=r"prompt_padding='longest' leaves prompts at their lengths, here \{'a cat': \d+, 'a very large cat': "
        r"\d+\}; give",
    ):
        prompter(tiny_folder("sd15"), "longest")(prompts)
    assert prompter(tiny_folder("sd15"))(prompts)["prompt_embeds"].shape[:2] == (2, 77)


def test_a_prompt_per_image(tiny_folder):
    backbone = db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl"))
    both = backbone(X, prompt=["a cat", "a dog"])
    for i, prompt in enumerate(["a cat", "a dog"]):
        for level, alone in zip(both, backbone(X[i : i + 1], prompt=prompt), strict=True):
            torch.testing.assert_close(level[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        backbone(X[:1], prompt="a cat")[0], backbone(X[:1], prompt="a dog")[0], rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="prompt must be one string or 2, one per image; got 3"):
        backbone(X, prompt=["a", "b", "c"])


def test_the_recipes_prompt_is_what_conditions(tiny_folder):
    folder = tiny_folder("sd15")
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder, prompt="a cat")
    assert torch.equal(backbone.conditioning.prompt_embeds, prompter(folder)(["a cat"])["prompt_embeds"])
    plain = db.create_model("sd15_gdf", checkpoint_path=folder)
    assert all(torch.equal(p, q) for p, q in zip(backbone(X), plain(X, prompt="a cat"), strict=True))


def test_embeddings_do_not_depend_on_the_backbones_dtype_or_autocast(tiny_folder, cache):
    full = prompter(tiny_folder("sd15"))(["a cat"])["prompt_embeds"]
    shutil.rmtree(cache)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = prompter(tiny_folder("sd15"))(["a cat"])["prompt_embeds"]
    assert torch.equal(mixed, full)
    shutil.rmtree(cache)
    half = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), dtype="float16", prompt="a cat")
    assert torch.equal(half.conditioning.prompt_embeds, full.half())
    assert torch.equal(prompter(tiny_folder("sd15"))(["a cat"])["prompt_embeds"], full)


# That it is done once.


def test_a_prompt_is_encoded_once_and_the_encoder_is_freed(tiny_folder, built, cache):
    encode = prompter(tiny_folder("sdxl"))
    first = encode(["a cat", "a cat", "a dog"])
    assert len(built) == 4  # two prompts, two encoders
    gc.collect()
    assert all(model() is None for model in built)
    assert len(list(cache.iterdir())) == 2
    again = prompter(tiny_folder("sdxl"))(["a dog", "a cat"])
    assert len(built) == 4
    for name in first:
        assert torch.equal(again[name], first[name][[2, 0]])
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name][0], first[name][1])


def test_one_text_encoder_is_held_at_a_time(tiny_folder, monkeypatch):
    alive: list[Any] = []
    build = clip.text_model

    def watched(*args: Any) -> Any:
        gc.collect()
        assert not any(model() is not None for model in alive), "the first text encoder is still held"
        model = build(*args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(clip, "text_model", watched)
    prompter(tiny_folder("sdxl"))(["a cat"])
    assert len(alive) == 2


@pytest.mark.parametrize(
    ("name", "encoders"),
    [("flux_schnell", 2), ("sd3_medium", 3), ("hunyuan_dit_12", 2), ("flux2_klein_4b", 1), ("z_image_turbo", 1)],
)
def test_large_text_encoders_are_loaded_alone_used_once_and_freed(name, encoders, tiny_folder, monkeypatch):
    """T5 and language models too: never two at a time, none left, and a second start loads none."""
    held: list[Any] = []
    text = Folder.text

    def watched(self: Folder, component: str) -> Any:
        gc.collect()
        assert not any(model() is not None for model in held), "another text encoder is still held"
        tokenizer, model = text(self, component)
        held.append(weakref.ref(model))
        return tokenizer, model

    monkeypatch.setattr(Folder, "text", watched)
    first = db.create_model(name, recipe=["vit-block2-out"], checkpoint_path=tiny_folder(name))
    assert len(held) == encoders
    gc.collect()
    assert not any(model() is not None for model in held)
    second = db.create_model(name, recipe=["vit-block2-out"], checkpoint_path=tiny_folder(name))
    assert len(held) == encoders
    assert torch.equal(first.conditioning.prompt_embeds, second.conditioning.prompt_embeds)


@pytest.mark.parametrize("what", ["prompt", "padding", "text encoder", "tokenizer"])
def test_what_changes_the_embedding_is_part_of_its_key(what, tiny_folder, built, tmp_path):
    folder = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "copy"))
    prompter(folder)(["a cat"])
    if what == "prompt":
        prompter(folder)(["a dog"])
    elif what == "padding":
        prompter(folder, "longest")(["a cat"])
    elif what == "text encoder":
        weights = folder / "text_encoder" / "model.safetensors"
        weights.touch()  # the same content
        prompter(folder)(["a cat"])
        assert len(built) == 1
        before = weights.stat()
        tensors = {name: 1.5 * t if t.is_floating_point() else t for name, t in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t do
        prompter(folder)(["a cat"])
    else:
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        prompter(folder)(["a cat"])
    assert len(built) == 2


def test_a_folder_that_was_moved_keeps_its_prompts(tiny_folder, built, tmp_path):
    folder = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "copy"))
    prompter(folder)(["a cat"])
    prompter(folder.rename(tmp_path / "moved"))(["a cat"])
    assert len(built) == 1


def test_a_cached_prompt_that_was_changed_is_made_again(tiny_folder, built, cache, caplog):
    """Names, shapes, dtypes and values: what is read is what was written."""
    encode = prompter(tiny_folder("sd15"))
    first = encode(["a cat"])["prompt_embeds"]
    [file] = cache.iterdir()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    changed = [first * float("nan"), first[..., :3].contiguous(), first.long(), first + 1e-3]
    for tensors in (*({"prompt_embeds": tensor} for tensor in changed), {"pooled": first}):
        for said in (metadata, {}):
            save_file(tensors, file, metadata=said)
            assert torch.equal(encode(["a cat"])["prompt_embeds"], first)
    assert len(built) == 11
    assert caplog.text.count("is made again") == 9  # one was right, and only had no digest


@pytest.mark.usefixtures("built")
def test_networks_without_text_cache_nothing(tiny_folder, cache):
    for name in ("ddpm_cifar10_32", "dit_xl_256"):
        db.create_model(
            name,
            recipe=["mid-vit-out" if name.startswith("ddpm") else "vit-block1-out"],
            checkpoint_path=tiny_folder(name),
        )
    assert not cache.exists()


@pytest.mark.parametrize("name", ["qwen_image", "flux2_klein_4b", "sd15"])
@pytest.mark.usefixtures("cache")
def test_a_prompt_holds_no_graph_of_its_encoder(name, tiny_folder):
    folder = Folder(tiny_folder(name))
    family = FAMILIES[db.get_checkpoint(name).family]
    rows = Prompter(family(folder.configs(family)), folder, "max_length")(["a cat"])
    assert not any(tensor.requires_grad for tensor in rows.values())


def test_a_broken_cached_prompt_is_made_again(tiny_folder, built, cache, caplog):
    encode = prompter(tiny_folder("sd15"))
    first = encode(["a cat"])
    [file] = cache.iterdir()
    for content in (b"", b"nonsense", file.read_bytes()[:-4]):
        file.write_bytes(content)
        assert torch.equal(encode(["a cat"])["prompt_embeds"], first["prompt_embeds"])
        assert f"the cached prompt {file} cannot be read and is made again" in caplog.text
        caplog.clear()
        assert torch.equal(load_file(file)["prompt_embeds"], first["prompt_embeds"])
    assert len(built) == 4


def test_a_cache_that_cannot_be_written_is_told_of_and_does_not_stop(tiny_folder, built, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        encode = prompter(tiny_folder("sd15"))
        assert encode(["a cat"])["prompt_embeds"].shape == (1, 77, 32)
    assert "the prompt is not cached, so the text encoder is loaded again next time" in caplog.text
    encode(["a cat"])
    assert len(built) == 2


def test_threads_encode_a_prompt_once(tiny_folder, built):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(backbone.prompter(["a cat"])["prompt_embeds"])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(built) == 2  # the recipe's, and this one


def test_the_cache_lies_beside_the_hubs_unless_told_otherwise(monkeypatch, tmp_path):
    from huggingface_hub import constants

    assert prompts.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DIFFUSION_BACKBONES_CACHE")
    assert prompts.cache_folder() == Path(constants.HF_HOME) / "diffusion_backbones"


# What is refused.


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_prompt_that_is_too_long_names_the_limit(name, tiny_folder, cache):
    with pytest.raises(
        ValueError,
        match=r"the prompt 'a cat and .*'\.\.\. has \d{3} tokens and the text encoder takes 77, start and end "
        r"included; shorten",
    ):
        prompter(tiny_folder(name))(["a cat and " * 60])
    assert not cache.exists()


def test_a_prompt_of_exactly_the_limit_is_taken(tiny_folder):
    folder = tiny_folder("sd15")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    one = len(tokenizer("a").input_ids) - 2
    longest = " ".join(["a"] * (75 // one))
    assert len(tokenizer(longest).input_ids) == 77
    assert prompter(folder)([longest])["prompt_embeds"].shape == (1, 77, 32)
    with pytest.raises(ValueError, match="has 78 tokens"):
        prompter(folder)([longest + " a"])


def test_without_a_text_encoder_a_prompt_says_what_to_do():
    backbone = db.create_model("sd15_gdf", device="meta")
    with pytest.raises(
        FileNotFoundError,
        match=r"prompt='a cat' needs a text encoder.*built without weights.*Give prompt_embeds=, or load it with pre",
    ):
        backbone.prompter(["a cat"])
