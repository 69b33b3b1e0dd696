"""Text encoders and tokenizers as people's folders hold them: read as stock classes read them, or refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import diffusion_backbones as db
from diffusion_backbones.spec.configs import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread", "costs_not_measured")
PROMPT = "a photo of a cat"
MODEL = "text_encoder/model.safetensors"


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, cache) -> Path:
    """A copy of the tiny model of the package, a diffusers folder."""
    assert not cache.exists()
    return Path(shutil.copytree(CONFIGS / "tinysd", tmp_path / "model"))


@pytest.fixture
def t5(tiny_folder, tmp_path, cache) -> Path:
    """A copy of a tiny network that is conditioned on T5."""
    assert not cache.exists()
    return Path(shutil.copytree(tiny_folder("pixart_alpha_512"), tmp_path / "t5"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def change(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | tensors, path)


def embed(folder: Path, prompt: str = PROMPT) -> torch.Tensor:
    backbone = db.create_model(
        f"local-dir:{folder}", recipe=[LEVEL[(folder / "unet").is_dir()]], prompt=prompt, noise="none"
    )
    return backbone.conditioning.prompt_embeds.clone()


LEVEL = {True: "mid-repeat0-res-out", False: "vit-block1-out"}


@torch.no_grad()
def stock(folder: Path, prompt: str = PROMPT) -> torch.Tensor:
    """What transformers' own classes for CLIP make of it."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
    return transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").float()(ids)[0]


# Tokenizers.


def lists_only(tokenizer: Path) -> None:
    """Leave the two lists that CLIP's tokenizer first came as."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    for path in tokenizer.iterdir():
        path.unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def without_config(tokenizer: Path) -> None:
    (tokenizer / "tokenizer_config.json").unlink()


def configured(**changes: Any) -> Any:
    return lambda tokenizer: edit(tokenizer / "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    "how",
    [
        configured(model_max_length=...),
        configured(model_max_length=10**30),
        configured(model_max_length=10_000),
        configured(tokenizer_class=...),
        configured(tokenizer_class="CLIPTokenizerFast"),
        without_config,
        lists_only,
    ],
)
def test_a_tokenizer_is_read_as_stock_reads_it(how, folder):
    expected = stock(folder)
    how(folder / "tokenizer")
    torch.testing.assert_close(stock(folder), expected)
    torch.testing.assert_close(embed(folder), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="text encoder takes 77"):
        embed(folder, "cat " * 90)


def cut(name: str, share: float) -> Any:
    """Keep the first lines or bytes of a list."""

    def change(tokenizer: Path) -> None:
        lists_only(tokenizer)
        text = (tokenizer / name).read_text()
        (tokenizer / name).write_text(text[: text.rindex("\n", 0, int(len(text) * share))])

    return change


def fewer_words(tokenizer: Path) -> None:
    lists_only(tokenizer)
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    words = dict(list(vocabulary.items())[:900]) | dict(list(vocabulary.items())[-2:])
    (tokenizer / "vocab.json").write_text(json.dumps(words))


def half_of(name: str) -> Any:
    def change(tokenizer: Path) -> None:
        data = (tokenizer / name).read_bytes()
        (tokenizer / name).write_bytes(data[: len(data) // 2])

    return change


def empty(name: str) -> Any:
    return lambda tokenizer: (tokenizer / name).write_text("")


def own_code(tokenizer: Path) -> None:
    (tokenizer / "own.py").write_text(f"open({str(tokenizer / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit(tokenizer / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (cut("merges.txt", 0.5), "cut short"),
        (fewer_words, "cut short|cannot be read"),
        (half_of("tokenizer.json"), "cannot be read"),
        (half_of("tokenizer_config.json"), "tokenizer_config.json is not JSON"),
        (empty("tokenizer.json"), "tokenizer.json is empty"),
        (empty("merges.txt"), "merges.txt is empty"),
        (configured(tokenizer_class="T5Tokenizer"), "'T5Tokenizer'.*CLIPTokenizer"),
        (configured(tokenizer_class="Foreign"), "'Foreign'"),
        (own_code, "auto_map.*never run"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(how, said, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    how(folder / "tokenizer")
    with pytest.raises(ValueError, match=f"{folder / 'tokenizer'}.*({said})"):
        embed(folder)
    assert not (folder / "tokenizer" / "ran").exists()


def test_a_broken_sentencepiece_model_is_refused(t5):
    half_of("spiece.model")(t5 / "tokenizer")
    with pytest.raises(ValueError, match=f"{t5 / 'tokenizer'}.*cannot be read"):
        embed(t5)


def test_code_of_a_tokenizer_of_another_kind_never_runs(t5, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    own_code(t5 / "tokenizer")
    with pytest.raises(ValueError, match="never run"):
        embed(t5)
    assert not (t5 / "tokenizer" / "ran").exists()


def test_a_token_without_a_row_is_named_where_it_is_used(folder):
    expected = embed(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens("<toy>")
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.testing.assert_close(embed(folder), expected)
    with pytest.raises(ValueError, match="'<toy>'.*1796.*1796 rows"):
        embed(folder, "a <toy>")


# Models.


def test_a_whole_t5_gives_its_encoder(t5):
    expected = embed(t5)
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.rand(4, 4), "lm_head.weight": torch.rand(60, 24)}
    change(t5 / MODEL, **extra)
    torch.testing.assert_close(embed(t5), expected, rtol=0, atol=0)
    for named in (["T5ForConditionalGeneration"], ["T5Model"], ...):
        edit(t5 / "text_encoder" / "config.json", architectures=named)
        torch.testing.assert_close(embed(t5), expected, rtol=0, atol=0)


def test_kernels_of_a_config_are_dropped(folder):
    expected = embed(folder)
    foreign = {"attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels", "auto_map": {}}
    edit(folder / "text_encoder" / "config.json", **foreign)
    torch.testing.assert_close(embed(folder), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["ChatGLMModel"]}, "'ChatGLMModel'.*CLIPTextModel.*T5EncoderModel"),
        ({"architectures": 5}, "5"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"hidden_size": "96"}, "CLIPTextModel"),
        ({"hidden_size": [96]}, "CLIPTextModel"),
        ({"hidden_act": "none of them"}, "none of them"),
    ],
)
def test_a_config_of_a_text_encoder_that_cannot_be_is_refused(changes, said, folder):
    edit(folder / "text_encoder" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"text_encoder/config.json.*{said}"):
        embed(folder)


def test_a_text_encoder_in_whole_numbers_is_refused(folder):
    name = next(name for name, tensor in load_file(folder / MODEL).items() if "q_proj.weight" in name)
    change(folder / MODEL, **{name: (load_file(folder / MODEL)[name] * 100).to(torch.int8)})
    with pytest.raises(ValueError, match=f"stored as whole numbers in .*{MODEL}.*q_proj.weight"):
        embed(folder)


def test_a_text_encoder_of_another_width_is_named(folder):
    config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_size, config.intermediate_size = 64, 64
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match=r"do not belong to the unet: prompt_embeds must be \(1, 77, 96\)"):
        embed(folder)


# The cache of embedded prompts.


def test_another_text_encoder_of_equal_size_and_time_is_embedded_anew(folder):
    os.utime(folder / MODEL, (10**9, 10**9))
    embed(folder)
    change(folder / MODEL, **{name: 1.5 * tensor for name, tensor in load_file(folder / MODEL).items()})
    os.utime(folder / MODEL, (10**9, 10**9))
    torch.testing.assert_close(embed(folder), stock(folder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda embeds: {"prompt_embeds": embeds * float("nan")},
        lambda embeds: {"prompt_embeds": embeds[..., :3].contiguous()},
        lambda embeds: {"prompt_embeds": embeds.long()},
        lambda embeds: {"prompt_embeds": embeds.half()},
        lambda embeds: {"prompt_embeds": embeds[0]},
        lambda embeds: {"prompt_embeds": embeds[:, :0]},
        lambda embeds: {"embeds": embeds},
    ],
)
def test_a_damaged_entry_is_made_again(damage, folder, cache, caplog):
    expected = embed(folder)
    [entry] = cache.rglob("*.safetensors")
    save_file(damage(load_file(entry)["prompt_embeds"]), entry)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(embed(folder), expected)
    assert "made again" in caplog.text
    assert torch.equal(load_file(entry)["prompt_embeds"], expected)


def test_nothing_is_cached_where_there_is_no_text(tiny_folder, cache, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            db.create_model(f"local-dir:{tiny_folder('ddpm_cat_256')}", recipe=["mid-repeat0-res-out"])
    assert not cache.exists()
    assert caplog.text == ""
