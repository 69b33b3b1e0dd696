"""Files and folders that are no checkpoint: each is called what it is, with what to do, and none that is whole is to be
deleted.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diffusion_backbones as db

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
WHOLE = struct.pack("<Q", len(HEADER)) + HEADER + bytes(12)

FORMATS: dict[str, tuple[bytes, str]] = {
    "sd15-Q8_0.gguf": (b"GGUF" + struct.pack("<I", 3) + bytes(200), "is a GGUF file"),
    "gguf.safetensors": (b"GGUF" + struct.pack("<I", 3) + bytes(200), "is a GGUF file"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch" + bytes(100), "is an ONNX graph"),
    "keras.safetensors": (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
    "flax_model.msgpack": (b"\x83" * 50, r"is a file of Flax \(msgpack\)"),
    "array.safetensors": (b"\x93NUMPY\x01\x00" + bytes(60), "is a NumPy array"),
    "weights.zip": (b"PK\x03\x04" + bytes(60), "is a zip archive; unpack it"),
    "weights.safetensors": (b"\x1f\x8b\x08" + bytes(60), "is a gzip archive; unpack it"),
    "config.json": (
        b'{"_class_name": "UNet2DConditionModel"}',
        "is the config of UNet2DConditionModel; give the folder",
    ),
    "model_index.json": (
        b'{"_class_name": "StableDiffusionPipeline"}',
        "is the index of a folder in the diffusers layout",
    ),
    "model.safetensors.index.json": (b'{"weight_map": {"a": "b"}}', "is an index of shards; give the folder"),
    "v1-inference.yaml": (b"model:\n  target: ldm.models\n", "is a YAML file of settings"),
    "page.safetensors": (b"<!DOCTYPE html><html>" + b"x" * 50, "is a web page.*`hf download"),
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a git-lfs pointer.*lfs pull",
    ),
    "pointer.ckpt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer.*lfs pull"),
    "picture.safetensors": (b"\x89PNG\r\n\x1a\n" + bytes(60), "is a PNG picture"),
    "empty.safetensors": (b"", "is empty; download or write it again"),
    "long.safetensors": (WHOLE + b"more", "is longer than its safetensors header says, 82 bytes"),
    "bytes.safetensors": (bytes(range(256)), "is not in the safetensors format, nor in another that is known"),
    "really.ckpt": (WHOLE, r"is a safetensors file under another suffix; rename it to really\.safetensors"),
}


def error(path: Any, name: str = "sd15_gdf", **more: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as caught:
        db.create_model(name, checkpoint_path=path, **more)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_format_is_called_so_and_not_deleted(name, tmp_path):
    data, said = FORMATS[name]
    (tmp_path / name).write_bytes(data)
    message = error(tmp_path / name)
    assert re.search(f"{re.escape(name)} .*{said}", message), message
    assert "delete" not in message


def test_a_pickle_under_another_name_is_a_pickle(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "renamed.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("renamed.safetensors", "old.safetensors"):
        message = error(tmp_path / name)
        assert f"{name} is a pickle, and loading a pickle runs whatever code it holds" in message
        assert "delete" not in message


@pytest.mark.parametrize(("size", "wanted"), [(9, "at least 70"), (69, "at least 70"), (70, "82"), (81, "82")])
def test_only_a_file_that_is_cut_short_is_to_be_deleted(size, wanted, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(WHOLE[:size])
    message = error(tmp_path / "cut.safetensors")
    assert f"({size} bytes) is cut short, of {wanted} bytes; delete it and download or write it again" in message


LDM, TRANSFORMERS = "input_blocks.0.0.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"
TENSORS: dict[str, tuple[list[str], str]] = {
    "lora of kohya": (
        ["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora_te_text_model.alpha"],
        "a LoRA in kohya",
    ),
    "lora of diffusers": (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA.*fuse_lora"),
    "lora of peft": (["base_model.model.down_blocks.0.attn1.to_q.lora_B.weight"], "a LoRA.*fuse_lora"),
    "loha": (["lora_unet_down_blocks_0_attn1_to_q.hada_w1_a"], "a LoRA"),
    "textual inversion": (["emb_params"], "a textual inversion.*prompt_embeds="),
    "textual inversion of sdxl": (["clip_l", "clip_g"], "a textual inversion"),
    "textual inversion of diffusers": (["<cat-toy>"], "a textual inversion"),
    "vae of ldm": (
        ["encoder.down.0.block.0.conv1.weight", "quant_conv.weight"],
        r"an image encoder \(VAE\) alone.*vae/",
    ),
    "vae of comfy": (["first_stage_model.encoder.conv_in.weight"], r"an image encoder \(VAE\) alone"),
    "vae of diffusers": (["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.bias"], "an image encoder"),
    "clip": ([TRANSFORMERS], r"a text encoder \(CLIP\).*text_encoder/"),
    "open clip": (["transformer.resblocks.0.attn.in_proj_weight", "text_projection"], r"a text encoder \(CLIP\)"),
    "t5": (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], r"a text encoder \(T5\)"),
    "language model": (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "a language model"),
    "controlnet": ([f"control_model.{LDM}"], "a ControlNet"),
    "bare controlnet": ([LDM, "input_hint_block.0.weight"], "a ControlNet"),
    "controlnet of diffusers": (["conv_in.weight", "controlnet_down_blocks.0.weight"], "a ControlNet"),
    "ip-adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    "motion module": (["down_blocks.0.motion_modules.0.proj_in.weight"], "a motion module of AnimateDiff"),
    "bitsandbytes": (["conv_in.weight", "mid_block.to_q.weight.absmax"], "weights that bitsandbytes quantized"),
    "scaled float8": ([f"model.diffusion_model.{LDM}", "scaled_fp8"], "scaled float8 weights"),
    "refiner of sdxl": (
        [
            f"model.diffusion_model.{LDM}",
            "model.diffusion_model.label_emb.0.0.weight",
            "conditioner.embedders.0.model.token_embedding.weight",
        ],
        "SDXL's refiner, .*one text encoder.*give the base network",
    ),
    "averaged alone": (["model_ema.diffusion_modelinput_blocks00weight"], r"averaged \(EMA\) weights alone"),
    "wrapped": (
        ["module.conv_in.weight", "module.down_blocks.0.resnets.0.conv1.weight"],
        "a state dict inside another",
    ),
    "compiled": (["_orig_mod.conv_in.weight"], r"a state dict inside another.*'_orig_mod\.'"),
    "ours": (["denoiser.conv_in.weight", "encoder.conv_in.weight"], "diffusion_backbones' own weights.*the folder"),
    "optimizer": (["state.0.exp_avg"], "the state of an optimizer"),
}


@pytest.mark.parametrize("base", [False, True], ids=["alone", "over a base"])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_safetensors_file_that_is_no_checkpoint_is_called_so(kind, base, tmp_path, tiny_folder):
    names, said = TENSORS[kind]
    file = tmp_path / "what.safetensors"
    save_file({name: torch.zeros(2, 3) for name in names}, file)
    place = {"name": f"local-dir:{tiny_folder('sd15')}", "recipe": ["mid-vit-out"]} if base else {}
    message = error(file, **place)
    assert re.search(rf"what\.safetensors is {said}", message), message
    assert "lacks" not in message
    assert "delete" not in message


def test_a_file_without_tensors_and_a_shard_are_called_so(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    assert "without any tensors" in error(tmp_path / "none.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    assert "is shard 2 of 3; give the folder" in error(tmp_path / "model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["img_in.weight", "double_blocks.0.img_attn_qkv.weight"], "HunyuanVideo, which is not read"),
        (["blocks.0.self_attn.norm_q.weight", "head.modulation"], "Wan, which is not read"),
        (["layer1.0.conv1.weight"], "nor another that is known here; its first tensors are layer1"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "the names that the authors of SD3 give"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "the names that the authors of Flux give"),
    ],
)
def test_a_denoiser_of_another_kind_is_called_so(names, said, tmp_path):
    save_file({name: torch.zeros(2, 3) for name in names}, tmp_path / "other.safetensors")
    message = error(tmp_path / "other.safetensors")
    assert re.search(rf"holds no unet of the kind of sd15.*{said}", message), message


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "lora": ({"pytorch_lora_weights.safetensors": ""}, "is the folder of a LoRA, .*fuse_lora"),
    "peft": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is the folder of a LoRA"),
    "controlnet": (
        {"config.json": '{"_class_name": "ControlNetModel"}'},
        "is the folder of ControlNetModel, which is not",
    ),
    "vae": ({"config.json": '{"_class_name": "AutoencoderKL"}'}, "is the folder of AutoencoderKL alone, .*sub-folder"),
    "text": ({"config.json": '{"architectures": ["CLIPTextModel"]}'}, "is the folder of CLIPTextModel alone"),
    "one file": (
        {"dream.safetensors": ""},
        r"is no folder in the diffusers layout, but holds dream\.safetensors; give",
    ),
    "pickle": ({"dream.ckpt": ""}, r"holds dream\.ckpt, which is a pickle"),
    "above": ({"mine/unet/config.json": "{}", "mine/x.json": "{}"}, "holds a checkpoint in a folder below it"),
    "another": ({"transformer/config.json": "{}", "vae/config.json": "{}"}, "holds transformer/ and no unet/"),
    "empty": ({}, "is empty"),
    "photos": ({"a.jpg": ""}, r"is no folder in the diffusers layout.*it holds a\.jpg"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_called_so(kind, tmp_path):
    files, said = FOLDERS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    message = error(tmp_path)
    assert re.search(f"{re.escape(str(tmp_path))} {said}", message), message


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://huggingface.co/owner/repo/blob/main/v1-5.safetensors", r"`hf download owner/repo v1-5\.safetensors`"),
        ("https://huggingface.co/owner/repo", "The name 'hf-hub:owner/repo' reads the repository"),
        ("https://civitai.com/api/download/models/1", "is an address.*Download it"),
        ("owner/my-dreambooth", "does not exist.*use 'hf-hub:owner/my-dreambooth' as the name"),
        ("hf-hub:owner/repo", "is a name; give it as the first argument"),
        (["a.safetensors", "b.safetensors"], "is one path, got 2; shards are read from the folder"),
        (7, "must be the path of a folder or a .safetensors file, got 7"),
    ],
)
def test_what_is_no_path_is_told_what_to_be(path, said):
    assert re.search(said, error(path)), error(path)


def test_an_address_as_name_is_told_the_name(tmp_path):
    with pytest.raises(ValueError, match="The name 'hf-hub:owner/repo' reads the repository"):
        db.create_model("https://huggingface.co/owner/repo")
    with pytest.raises(KeyError, match="For a repository on the hub use 'hf-hub:owner/repo'"):
        db.create_model("owner/repo", recipe=["mid-vit-out"])


@pytest.fixture
def other_variants(tmp_path, tiny_folder):
    def make(*variants: str) -> Path:
        import shutil

        folder = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "variants"))
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        for variant in variants:
            shutil.copy(file, file.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
        file.unlink()
        return folder

    return make


@pytest.mark.parametrize("variant", ["bf16", "non_ema", "my-own"])
def test_the_only_variant_that_is_there_is_taken(variant, other_variants, tiny_folder, caplog):
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    got = db.create_model("sd15_gdf", checkpoint_path=other_variants(variant))(x)
    assert f"diffusion_pytorch_model.{variant}.safetensors alone, which is read" in caplog.text
    for ours, expected in zip(got, db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))(x), strict=True):
        assert torch.equal(ours, expected)


def test_of_several_variants_one_must_be_chosen(other_variants):
    assert "but the variants bf16, non_ema; leave one of them" in error(other_variants("bf16", "non_ema"))
