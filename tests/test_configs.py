"""What configs of files say is read as diffusers reads it, or refused by file and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, LatentConsistencyModelPipeline, UNet2DConditionModel
from diffusers import StableDiffusionXLImg2ImgPipeline as Img2Img
from safetensors.torch import load_file, save_file

import diffusion_backbones as db
from diffusion_backbones.families import FAMILIES, upstream
from diffusion_backbones.spec.configs import CONFIGS, package_configs
from diffusion_backbones.spec.registry import get_checkpoint, list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "costs_not_measured")
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
X = torch.linspace(-1, 1, 3 * 64 * 128).view(1, 3, 64, 128).sin()
NAN = float("nan")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the tiny model of the package, a diffusers folder."""
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(CONFIGS / "tinysd", tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def build(folder: Path, **keywords: Any) -> db.DiffusionBackbone:
    return db.create_model("tinysd_gdf", checkpoint_path=folder, **keywords)


@pytest.mark.parametrize("name", list_checkpoints())
def test_every_config_of_the_package_is_read(name):
    checkpoint = get_checkpoint(name)
    read = upstream.read(FAMILIES[checkpoint.family], package_configs(checkpoint), name)
    for component, config in package_configs(checkpoint).items():
        assert read[component].items() >= config.items()


# The latents.

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]


@torch.no_grad()
def test_mean_and_deviation_of_latents_are_applied_as_in_the_stock_pipeline(folder):
    edit(folder / VAE, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    pipe = Img2Img(*[None] * 5, UNet2DConditionModel.from_pretrained(folder / "unet"), None)
    pipe.vae, pipe.vae_scale_factor = AutoencoderKL.from_pretrained(folder / "vae"), 8
    pipe.vae.encode = lambda x, encode=pipe.vae.encode: encode(x)
    mode = type("Mode", (), {"latents": pipe.vae.encode(X).latent_dist.mode()})()
    pipe.vae.encode = lambda _: mode  # the pipeline samples, backbones take the mode
    expected = pipe.prepare_latents(X, None, 1, 1, torch.float32, torch.device("cpu"), add_noise=False)
    backbone = build(folder, timestep=50)
    torch.testing.assert_close(backbone.encode(X), expected, rtol=1e-5, atol=1e-5)
    saved = backbone.save_pretrained(folder.parent / "saved")
    config = json.loads((saved / "config.json").read_text())["configs"]["vae"]
    assert (config["latents_mean"], config["latents_std"]) == (MEAN, STD)
    assert torch.equal(db.create_model(f"local-dir:{saved}").encode(X), backbone.encode(X))
    unscaled = build(folder, scaled=False).encode(X)
    torch.testing.assert_close(unscaled, mode.latents, rtol=1e-5, atol=1e-5)


SHIFTED = [
    name for name in list_checkpoints() if package_configs(get_checkpoint(name)).get("vae", {}).get("shift_factor")
]


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("left", [{}, {"shift_factor": None}])
def test_a_shift_that_a_pipeline_subtracts_must_be_said(name, left):
    """Stock pipelines of these networks compute with None and fail; without a shift the latents are others."""
    assert {"sd3_medium", "flux_dev", "chroma1_hd", "lumina_image_2", "z_image_turbo"} <= set(SHIFTED)
    checkpoint = get_checkpoint(name)
    configs = package_configs(checkpoint)
    vae = {key: value for key, value in configs["vae"].items() if key != "shift_factor"} | left
    with pytest.raises(ValueError, match=r"here: vae/config\.json has no shift_factor, which the denoiser was trained"):
        upstream.read(FAMILIES[checkpoint.family], {**configs, "vae": vae}, "here")


@torch.no_grad()
def test_scaling_of_before_the_key_existed(folder):
    """diffusers' pipelines then multiplied by 0.18215 themselves, which is its default since."""
    edit(folder / VAE, scaling_factor=..., _diffusers_version="0.6.0")
    stock = AutoencoderKL.from_pretrained(folder / "vae")
    assert stock.config.scaling_factor == 0.18215
    expected = stock.encode(X).latent_dist.mode() * stock.config.scaling_factor
    torch.testing.assert_close(build(folder).encode(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling_factor": 0}, "scaling_factor 0"),
        ({"scaling_factor": -1.0}, "scaling_factor -1.0"),
        ({"scaling_factor": NAN}, "scaling_factor nan"),
        ({"scaling_factor": None}, "scaling_factor None"),
        ({"scaling_factor": "0.18"}, "scaling_factor '0.18'"),
        ({"scaling_factor": ...}, "no scaling_factor"),
        ({"shift_factor": float("inf")}, "shift_factor inf"),
        ({"latents_mean": MEAN}, "latents_std None"),
        ({"latents_std": STD}, "latents_mean None"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "latents_mean .*must be 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": [1, 1, 0, 1]}, "latents_std .*above 0"),
        ({"latents_mean": MEAN, "latents_std": [1, 1, NAN, 1]}, "latents_std .*finite"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "shift_factor 0.1"),
        ({"in_channels": 1}, "in_channels 1"),
        ({"latent_channels": "4"}, "latent_channels '4'"),
        ({"block_out_channels": 4}, "block_out_channels 4"),
        ({"block_out_channels": [32]}, "block_out_channels says 1 levels"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
        ({"_class_name": ...}, "None"),
    ],
)
def test_an_image_encoder_that_does_not_say_its_latents_is_refused(changes, said, folder):
    edit(folder / VAE, **changes)
    with pytest.raises(ValueError, match=f"{folder}: vae/config.json.*{said}"):
        build(folder)


@pytest.mark.parametrize("changes", [{"norm_num_groups": 7}, {"down_block_types": ["NoBlock"] * 4}])
def test_an_image_encoder_that_cannot_be_built_is_named(changes, folder):
    edit(folder / VAE, **changes)
    with pytest.raises(ValueError, match="cannot build AutoencoderKL with this vae/config.json"):
        build(folder, device="meta")


# The network.


@torch.no_grad()
@pytest.mark.parametrize("key", ["freq_shift", "flip_sin_to_cos", "act_fn", "center_input_sample", "norm_eps"])
def test_a_key_that_is_left_out_is_diffusers_default(key, folder):
    expected = build(folder)(X)
    stated = json.loads((folder / UNET).read_text())[key]
    edit(folder / UNET, **{key: ...})
    stock = UNet2DConditionModel.from_config(json.loads((folder / UNET).read_text()))
    assert stock.config[key] == stated  # the package's config states the default
    for ours, whole in zip(build(folder)(X), expected, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 9}, "in_channels 9.*inpainting"),
        ({"in_channels": 8}, "in_channels 8.*InstructPix2Pix"),
        ({"in_channels": 5}, "in_channels 5.*depth"),
        ({"in_channels": 16}, "takes 16 channels, and the image encoder gives 4"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"num_class_embeds": 1000}, "num_class_embeds 1000"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"addition_embed_type": "text"}, "another way"),
        ({"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim 4096"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type 'ip_image_proj'"),
        ({"attention_type": "gated"}, "attention_type 'gated'"),
        ({"cross_attention_dim": [96, 96, 96, 96]}, "cross_attention_dim"),
        ({"_class_name": "ControlNetModel"}, "ControlNetModel.*UNet2DConditionModel"),
        ({"_class_name": ["UNet2DConditionModel"]}, "class"),
        ({"_class_name": ...}, "no _class_name"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": "gptq"}, "gptq"),
        ({"block_out_channels": 320}, "block_out_channels 320"),
        ({"block_out_channels": [8]}, "1 levels"),
        ({"block_out_channels": ["a", "b", "c", "d"]}, "UNet2DConditionModel"),
        ({"block_out_channels": [0, 0, 0, 0]}, "block_out_channels 0"),
        ({"in_channels": "4"}, "in_channels '4'"),
        ({"in_channels": [4]}, "in_channels .4."),
        ({"in_channels": True}, "in_channels True"),
        ({"layers_per_block": -1}, "layers_per_block -1"),
        ({"layers_per_block": 10**9}, "layers_per_block 1000000000"),
        ({"cross_attention_dim": 10**15}, "cross_attention_dim 1000000000000000"),
        ({"cross_attention_dim": None}, "cross_attention_dim None"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types 'DownBlock2D'"),
        ({"norm_eps": NAN}, "norm_eps nan"),
        ({"down_block_types": ["NoBlock2D"] * 4}, "NoBlock2D|UNet2DConditionModel"),
        ({"norm_num_groups": 7}, "UNet2DConditionModel"),
    ],
)
def test_a_network_that_is_not_read_is_refused_by_file_and_key(changes, said, folder):
    edit(folder / UNET, **changes)
    with pytest.raises(ValueError, match=f"(?s)unet/config.json.*{said}|{said}.*unet/config.json"):
        build(folder, device="meta")


@pytest.mark.parametrize(("channels", "said"), [(384, "FLUX.1 Fill"), (128, "FLUX.1 Depth and Canny")])
def test_relatives_of_flux_are_refused_by_name(channels, said):
    checkpoint = get_checkpoint("flux_dev")
    configs = package_configs(checkpoint)
    configs["transformer"]["in_channels"] = channels
    with torch.device("meta"):
        FluxTransformer2DModel.from_config(configs["transformer"] | {"num_layers": 1, "num_single_layers": 1})
    with pytest.raises(ValueError, match=f"transformer/config.json has in_channels {channels}.*{said}"):
        upstream.read(FAMILIES["flux"], configs, "here")


def test_the_refiner_is_refused_by_name():
    """Its published numbers: 1280 of the pooled text, and five numbers of 256 channels."""
    configs = package_configs(get_checkpoint("sdxl"))
    configs["unet"] |= {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
    with pytest.raises(ValueError, match="unet/config.json .*2560.*refiner"):
        upstream.read(FAMILIES["unet"], configs, "here")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", VAE, TEXT])
@pytest.mark.parametrize("content", ["[]", "5", "null", '{"a": ', '"text"', "[" * 100_000])
def test_a_config_that_is_no_object_is_named(name, content, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        build(folder)


@pytest.mark.parametrize(
    "configs", [5, [], {}, {"unet": 5}, {"unet": None, "vae": None, "scheduler": None}, {"unet": {}, "vae": {}}]
)
def test_configs_of_a_saved_backbone_are_checked(configs, folder):
    saved = build(folder).save_pretrained(folder.parent / "saved")
    edit(saved / "config.json", configs=configs)
    with pytest.raises(ValueError, match=f"{saved}: config.json"):
        db.create_model(f"local-dir:{saved}")


# The guidance scale of distilled networks.


@torch.no_grad()
def test_an_embedded_guidance_scale_is_the_pipelines(folder):
    """LatentConsistencyModelPipeline always embeds one, 8.5 unless told otherwise."""
    edit(folder / UNET, time_cond_proj_dim=32)
    torch.manual_seed(0)
    stock = UNet2DConditionModel.from_config(json.loads((folder / UNET).read_text())).eval()
    stock.save_pretrained(folder / "unet")
    backbone = build(folder, timestep=51)
    noise, path = torch.randn(1, 4, 8, 16), "mid_block.resnets.0"
    alpha, sigma = backbone.forward_process.levels(51)
    z = alpha * backbone.encode(X) + sigma * noise
    found: list[torch.Tensor] = []
    stock.get_submodule(path).register_forward_hook(lambda _, __, out: found.append(out))
    for scale, given in ((8.5, {}), (1.0, {"guidance": torch.tensor([1.0])})):
        embedded = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.tensor([scale - 1]), embedding_dim=32
        )
        stock(z, 51, backbone.conditioning.prompt_embeds, timestep_cond=embedded)
        ours = backbone.forward_activations(X, [path], noise=noise, **given)[path]
        torch.testing.assert_close(ours, found[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


# Weights.


def change_weights(path: Path, change: Any) -> str:
    """Change one large weight of a file, and return its name."""
    state = load_file(path)
    name = next(name for name in state if state[name].ndim == 2 and "down_blocks" in name)
    save_file(state | {name: change(state[name])}, path)
    return name


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_named(value, dtype, folder):
    def one(weight):
        weight = weight.clone()
        weight[-1, -1] = value
        return weight

    name = change_weights(folder / WEIGHTS, one)
    with pytest.raises(ValueError, match=f"{name} in .*{WEIGHTS} holds NaN or infinity"):
        build(folder, dtype=dtype)


def test_a_weight_that_float16_cannot_hold_is_named(folder):
    name = change_weights(folder / WEIGHTS, lambda weight: weight.float() * 0 + 1e5)
    with pytest.raises(ValueError, match=f"{name} in .*torch.float16 cannot hold"):
        build(folder, dtype="float16")
    assert all(level.isfinite().all() for level in build(folder)(X))


def test_a_saved_prompt_that_is_not_finite_is_named(folder):
    saved = build(folder).save_pretrained(folder.parent / "saved")
    state = load_file(saved / "model.safetensors")
    name = "conditioning.prompt_embeds"
    save_file(state | {name: state[name] * NAN}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="prompt_embeds in .*model.safetensors holds NaN"):
        db.create_model(f"local-dir:{saved}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_weights_in_whole_numbers_are_refused(dtype, weight_dtype, folder):
    name = change_weights(folder / WEIGHTS, lambda weight: (weight * 100).to(dtype))
    with pytest.raises(ValueError, match=f"stored as whole numbers in .*{WEIGHTS}: {name}.*quantized"):
        build(folder, weight_dtype=weight_dtype)


@pytest.mark.parametrize("scale", [".absmax", ".SCB", "_scale", ".quant_state.bitsandbytes__nf4"])
def test_scales_of_quantized_weights_are_known(scale, folder):
    state = load_file(folder / WEIGHTS)
    name = next(name for name in state if name.endswith("to_k.weight"))
    save_file(state | {name + scale: torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name}{scale}. They are of quantized weights"):
        build(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "complex64", "float31", 16])
def test_a_dtype_that_nothing_computes_in_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be one that networks compute in, 'float16'"):
        db.create_model("tinysd_gdf", dtype=dtype, device="meta")
