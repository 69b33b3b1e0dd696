"""float16 where it overflows: an image encoder that must not run in it never does, and attention maps are finite.

The right latents are those of the stock autoencoder in float32, the right maps are computed here in float64.
"""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import diffusion_backbones as db
from diffusion_backbones.ops import attention_maps

pytestmark = pytest.mark.usefixtures("costs_not_measured")

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
X = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).sin()


def overflowing(folder, to):
    """A copy of a tiny checkpoint whose encoder has maps beyond 65504, from weights that float16 holds."""
    import shutil

    folder = shutil.copytree(folder, to)
    state = load_file(folder / WEIGHTS)
    state["encoder.mid_block.resnets.0.norm2.weight"] *= 1e3
    state["encoder.mid_block.resnets.0.conv2.weight"] *= 3e3
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def sdxl(tiny_folder, tmp_path_factory):
    return overflowing(tiny_folder("sdxl"), tmp_path_factory.mktemp("overflowing") / "sdxl")


@pytest.fixture(scope="module")
def latents(sdxl):
    """The stock autoencoder's, in float32."""
    vae = AutoencoderKL.from_pretrained(sdxl / "vae")
    with torch.no_grad():
        return vae.encode(X).latent_dist.mode() * vae.config.scaling_factor


def test_the_encoder_does_overflow_and_stock_pipelines_bring_it_to_float32(sdxl, latents):
    vae = AutoencoderKL.from_pretrained(sdxl / "vae", torch_dtype=torch.float16)
    with torch.no_grad():
        assert not torch.isfinite(vae.encode(X.half()).latent_dist.mode()).any()
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=AutoencoderKL.from_pretrained(sdxl / "vae"),
        unet=UNet2DConditionModel.from_pretrained(sdxl / "unet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(sdxl / "scheduler"),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    ).to(torch.float16)
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = pipe.prepare_latents(X.half(), None, 1, 1, torch.float16, "cpu", generator=seeded, add_noise=False)
    assert torch.isfinite(drawn).all()  # a sample of the posterior whose mode the fixture has


def check(backbone, latents, x=X):
    maps, z = backbone(x), backbone.encode(x)
    assert all(torch.isfinite(m).all() for m in maps)
    share = 2e-3 if x.dtype == torch.float32 else 2e-2  # of the largest; float16 rounds the image too
    torch.testing.assert_close(z.float(), latents, rtol=share, atol=share * float(latents.abs().max()))


def test_under_autocast(sdxl, latents):
    for dtype in ("float32", "float16"):
        backbone = db.create_model("sdxl_gdf", checkpoint_path=sdxl, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.float16):
            check(backbone, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(backbone.encode(X)).all()


def test_cast_by_itself_and_inside_others(sdxl, latents):
    for cast in (
        lambda b: b.half(),
        lambda b: torch.nn.Sequential(b).to(torch.float16)[0],
        lambda b: torch.nn.ModuleDict({"a": torch.nn.Sequential(b)}).to("cpu", torch.float16)["a"][0],
        lambda b: b.type(torch.float16),
    ):
        backbone = cast(db.create_model("sdxl_gdf", checkpoint_path=sdxl))
        assert (backbone.dtype, backbone.encoder_dtype) == (torch.float16, torch.float32)
        check(backbone, latents)
        check(backbone, latents, X.half())
    assert db.create_model("sdxl_gdf", checkpoint_path=sdxl).bfloat16().encoder_dtype == torch.bfloat16
    assert db.create_model("sdxl_gdf", device="meta").half().encoder_dtype == torch.float32


def test_an_encoder_that_is_cast_alone_is_refused_at_the_call(sdxl):
    backbone = db.create_model("sdxl_gdf", checkpoint_path=sdxl)
    backbone.encoder.to(torch.float16)
    with pytest.raises(ValueError, match="image encoder of sdxl_gdf overflows in float16, and its weights were cast"):
        backbone(X)


@pytest.mark.parametrize("says", [True, False, None])
def test_a_folder_says_so_by_its_own_config(says, tiny_folder, tmp_path):
    folder = overflowing(tiny_folder("sd15"), tmp_path / "sd15")
    path = folder / "vae/config.json"
    config = json.loads(path.read_text()) | {"force_upcast": says}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for name, recipe in (("sd15_gdf", None), (f"local-dir:{folder}", ["mid-vit-out"])):
        place = {"checkpoint_path": folder} if recipe is None else {"recipe": recipe}
        backbone = db.create_model(name, dtype="float16", **place)
        assert backbone.encoder_dtype == (torch.float32 if says else torch.float16)
        assert bool(torch.isfinite(backbone.encode(X)).all()) is bool(says)
        saved = backbone.save_pretrained(tmp_path / f"saved_{name[:4]}")
        again = db.create_model(f"local-dir:{saved}", dtype="float16")
        assert again.encoder_dtype == backbone.encoder_dtype


# Attention maps.


def exact(q, k, bias=None):
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if bias is None else scores + bias[:, None, None].double()).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_maps_are_finite_where_scores_pass_65504(dtype, autocast):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 9, 16, generator=generator).to(dtype) * 150 for _ in range(2))
    bias = torch.tensor([[0.0] * 8 + [-float("inf")]] * 2)
    assert float((q.double() @ k.double().transpose(-1, -2)).abs().max()) > 65504 * 4  # also when scaled by 1 / 4
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        found = attention_maps.probabilities(q, k, slice(None), bias=bias)
        linear = attention_maps.linear_probabilities(q, k)
    torch.testing.assert_close(found.double(), exact(q, k, bias), rtol=0.01, atol=0.004)
    weights = torch.relu(q.double()) @ torch.relu(k.double()).transpose(-1, -2)
    torch.testing.assert_close(linear.double(), weights / weights.sum(-1, keepdim=True), rtol=0.01, atol=0.004)
    assert found.dtype == linear.dtype == dtype


def test_the_map_of_a_whole_network_is_finite_as_its_features_are(tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder("sd21"), tmp_path / "sd21")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    for name in state:
        if "attn1.to_q.weight" in name or "attn1.to_k.weight" in name:
            state[name] *= 400
    save_file(state, weights)
    place, map_id = f"local-dir:{folder}", "up-level1-repeat0-vit-block0-self-map"
    backbone = db.create_model(place, recipe=["up-level1-repeat1-res-out"], dtype="float16")
    acts = backbone.forward_activations(X, [map_id, "up-level1-repeat1-res-out"])
    assert all(torch.isfinite(act).all() for act in acts.values())
    torch.testing.assert_close(acts[map_id].float().sum(-1), torch.ones(acts[map_id].shape[:-1]), rtol=5e-3, atol=5e-3)
