"""Unconditional U-Nets on pixels."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from oracle import Oracle

import diffusion_backbones as db
from diffusion_backbones import Recipe
from diffusion_backbones.spec.recipe import Level

pytestmark = pytest.mark.usefixtures("costs_not_measured")

NAMES = ("ddpm_cifar10_32", "ddpm_celebahq_256")


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
@pytest.mark.parametrize("timestep", [50, 261])
@pytest.mark.parametrize("name", NAMES)
def test_every_activation_is_that_of_the_stock_network(name, timestep, size, tiny_folder):
    backbone = db.create_model(name, recipe=["unet-out"], checkpoint_path=tiny_folder(name), timestep=timestep)
    sites = backbone.catalogue.all()
    levels = len(backbone.configs["unet"]["block_out_channels"])
    attended = {"ddpm_cifar10_32": 2 + 1 + 3, "ddpm_celebahq_256": 2 + 1 + 3}[name]  # down, mid, up
    assert len(sites) == 3 + 2 * (2 * levels + 2) + 3 * (3 * levels) + 2 * (levels - 1) + 5 * attended
    torch.manual_seed(1)
    x = torch.rand(2, 3, *size) * 2 - 1
    z_t = DDPMScheduler.from_config(tiny.configs(name)["scheduler"]).add_noise(
        x, backbone.canvas[:, :, : size[0], : size[1]], torch.tensor(timestep)
    )
    oracle = Oracle(tiny.build(name)["unet"], plain=True)
    oracle(z_t, timestep)
    for activation, act in backbone.forward_activations(x, [site.id for site in sites]).items():
        torch.testing.assert_close(
            act,
            oracle[activation],
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, activation=activation: f"{activation}: {text}",
        )
        assert (
            act.shape[1 if backbone.catalogue[activation].layout != "tokens" else 2]
            == backbone.catalogue[activation].channels
        ), activation


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_was_cut_gives_the_same_and_holds_less(name, tiny_folder, tmp_path):
    x = torch.rand(1, 3, 75, 110) * 2 - 1
    whole = db.create_model(name, recipe=["unet-out"], checkpoint_path=tiny_folder(name))
    count = sum(p.numel() for p in whole.denoiser.parameters())
    for site in [site for site in whole.catalogue.all() if site.layout != "attention"][::4]:
        [expected] = whole.forward_activations(x, [site.id], as_maps=True).values()
        backbone = db.create_model(name, recipe=Recipe("mine", (Level((site.id,)),)), checkpoint_path=tiny_folder(name))
        assert torch.equal(backbone(x)[0], expected), site.id
        assert sum(p.numel() for p in backbone.denoiser.parameters()) < count or site.id == "unet-out"
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'saved')}")
    assert torch.equal(saved(x)[0], backbone(x)[0])
    assert list(backbone.conditioning.items()) == []


def test_nothing_conditions_it(tiny_folder):
    backbone = db.create_model(NAMES[0], recipe=["mid-vit-out"], checkpoint_path=tiny_folder(NAMES[0]))
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="the timestep alone conditions this network"):
        backbone(x, prompt="a cat")
    with pytest.raises(TypeError, match="is not conditioned on prompt_embeds; it takes none"):
        backbone(x, prompt_embeds=torch.zeros(1, 4))
    assert backbone.feature_info.reduction() == [8]
    assert backbone.encode(x).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["ddpm_cifar10_32", "flux_schnell", "pixart_sigma_1024", "dit_xl_256", "sd3_medium"])
def test_a_folder_says_itself_what_it_is(name, tiny_folder):
    activation = "mid-vit-out" if name.startswith("ddpm") else "vit-block1-out"
    backbone = db.create_model(f"local-dir:{tiny_folder(name)}", recipe=[activation])
    assert backbone.declaration.checkpoint.family == db.get_checkpoint(name).family
    expected = db.create_model(name, recipe=[activation], checkpoint_path=tiny_folder(name))
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(backbone(x)[0], expected(x)[0])
