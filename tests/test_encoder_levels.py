"""Fine maps of the image encoder: as the stock encoder computes them, in recipes and in place of upsampling."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("costs_not_measured")

IDS = [f"encoder-level{level}-repeat{repeat}-res-out" for level in range(4) for repeat in range(2)] + [
    f"encoder-level{i}-downsampler-out" for i in range(3)
]
STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("sd15")


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 100, 150, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_every_map_is_that_of_the_stock_encoder(folder, x):
    vae, kept = AutoencoderKL.from_pretrained(folder / "vae"), {}
    for activation in IDS:
        level, rest = activation.removeprefix("encoder-level").split("-", 1)
        path = f"encoder.down_blocks.{level}." + ("downsamplers.0" if "down" in rest else f"resnets.{rest[6]}")
        vae.get_submodule(path).register_forward_hook(
            lambda m, a, o, activation=activation: kept.__setitem__(activation, o)
        )
    vae.encode(F.pad(x, (0, 42, 0, 28)))
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder)
    acts = backbone.forward_activations(x, IDS)
    assert list(acts) == IDS
    for activation, act in acts.items():
        torch.testing.assert_close(act, kept[activation], rtol=1e-5, atol=1e-5)
    assert all(activation in backbone.catalogue for activation in IDS)
    assert not set(IDS) & set(iter(backbone.catalogue)), "no id of GDF"
    assert db.create_model(
        "sd15", recipe=["up_blocks.1.resnets.2", "encoder.down_blocks.0.resnets.1"], device="meta"
    ).feature_info.reduction() == [1, 32]


@torch.no_grad()
def test_they_stand_in_a_recipe_beside_the_denoisers_own(folder, x, tmp_path):
    ids = [
        "encoder-level2-repeat1-res-out",
        "encoder-level3-repeat1-res-out",
        "up-level3-repeat2-vit-out",
        "up-level1-repeat2-res-out",
    ]
    backbone = db.create_model("sd15", recipe=ids, checkpoint_path=folder)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([32, 32 + 16, 64], [4, 8, 32])
    maps = backbone(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(25, 38), (13, 19), (4, 5)]
    acts = backbone.forward_activations(x, ids, as_maps=True)
    assert torch.equal(maps[0], acts[ids[0]])
    assert torch.equal(maps[1], torch.cat([acts[ids[1]], acts[ids[2]]], 1))
    for other in (copy.deepcopy(backbone), db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")):
        assert all(torch.equal(a, b) for a, b in zip(other(x), maps, strict=True))
    assert torch.equal(backbone(x, indices=[0])[0], maps[0])
    assert torch.equal(backbone(x, ensemble=2)[0], maps[0]), "no noise has been mixed in yet"
    half = db.create_model("sd15", recipe=ids, checkpoint_path=folder, dtype=torch.bfloat16)
    assert {m.dtype for m in half(x)} == {torch.bfloat16}
    assert backbone.prune_intermediate_layers([0, 2]) == [0, 2]
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), (maps[0], maps[2]), strict=True))


@torch.no_grad()
def test_they_take_the_place_of_upsampling_and_change_nothing_else(folder, x):
    upsampled = db.create_model("sd15_gdf", checkpoint_path=folder, out_strides=STRIDES)
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder, out_strides=STRIDES, encoder_levels=True)
    assert (backbone.feature_info.channels()[0], backbone.feature_info.reduction()) == (32, [4, 8, 16, 32])
    maps = backbone(x)
    assert torch.equal(
        maps[0],
        backbone.forward_activations(x, ["encoder-level2-repeat1-res-out"], as_maps=True)[
            "encoder-level2-repeat1-res-out"
        ],
    )
    assert all(torch.equal(a, b) for a, b in zip(maps[1:], upsampled(x)[1:], strict=True))
    parameters = {n: p.shape for n, p in backbone.named_parameters()}
    assert parameters == {n: p.shape for n, p in upsampled.named_parameters()}, "they cost nothing"


def test_training_leaves_the_encoder_as_it_is(folder, x):
    backbone = db.create_model(
        "sd15_gdf", checkpoint_path=folder, out_strides=STRIDES, encoder_levels=True, trainable=True
    )
    maps = backbone.train()(x)
    assert not maps[0].requires_grad
    sum(m.float().pow(2).mean() for m in maps[1:]).backward()
    assert all(p.grad is None for p in backbone.encoder.parameters())
    assert all(p.grad is not None for p in backbone.denoiser.parameters() if p.requires_grad)


def test_what_cannot_be_is_refused(folder, x):
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder, out_strides=STRIDES, encoder_levels=True)
    z = backbone.encode(x)
    with pytest.raises(
        ValueError,
        match=r"encoder-level2-repeat1-res-out is read in the image encoder, so it needs the image, and latents were "
        r"given",
    ):
        backbone(latents=z)
    with pytest.raises(ValueError, match="take other levels with indices="):
        backbone.forward_latents(z, (100, 150))
    assert len(backbone.forward_latents(z, (100, 150), indices=[1, 2, 3])) == 3
    with pytest.raises(
        ValueError,
        match="encoder-level0-repeat0-res-out is read in the image encoder, and no level is read in the diffusion",
    ):
        db.create_model("sd15", recipe=["encoder-level0-repeat0-res-out"], device="meta")
    with pytest.raises(
        ValueError, match=r"encoder_levels=True: no map of the image encoder has stride 3; it has \[1, 2, 4, 8\]"
    ):
        db.create_model("sd15_gdf", device="meta", out_strides=(3, 8), encoder_levels=True)
    with pytest.raises(ValueError, match="no map of the image encoder has stride 4; it has no readable activations"):
        db.create_model(
            "sana_1600m_1024", recipe=["vit-block3-out"], device="meta", out_strides=(4, 8), encoder_levels=True
        )
    with pytest.raises(
        ValueError, match=r"encoder_levels=True fills strides .* needs out_strides=, such as \(4, 8, 16, 32\)"
    ):
        db.create_model("sd15_gdf", device="meta", encoder_levels=True)
    with pytest.raises(KeyError, match="encoder-level9-repeat0-res-out"):
        db.create_model("sd15", recipe=["encoder-level9-repeat0-res-out"], device="meta")
