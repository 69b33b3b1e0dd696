"""Every activation equals that of the stock, whole network, and every recipe is what its source says."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from oracle import Oracle

import diffusion_backbones as db
from diffusion_backbones.spec.configs import package_configs

COUNTS = {"sd15": (197, 165), "sd21": (197, 165), "sdxl": (612, 472)}


def conditioning(name: str, b: int, size: tuple[int, int]) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The same random conditioning in this package's words and in the stock network's."""
    torch.manual_seed(7)
    ours = {"prompt_embeds": torch.randn(b, 77, tiny.CROSS)}
    stock: dict[str, object] = {"encoder_hidden_states": ours["prompt_embeds"]}
    if name == "sdxl":
        ours["pooled_prompt_embeds"] = torch.randn(b, tiny.POOLED)
        ids = torch.tensor([[*size, 0, 0, *size]] * b, dtype=torch.float32)
        stock["added_cond_kwargs"] = {"text_embeds": ours["pooled_prompt_embeds"], "time_ids": ids}
    return ours, stock


@pytest.mark.parametrize("latent", [(16, 16), (16, 24)], ids=["square", "wide"])
@pytest.mark.parametrize("timestep", [50, 261])
@pytest.mark.parametrize("name", COUNTS)
def test_every_activation_is_that_of_the_stock_network(name, timestep, latent, tiny_folder):
    backbone = db.create_model(name, recipe=["unet-out"], checkpoint_path=tiny_folder(name), noise="none")
    ids = list(backbone.catalogue)
    assert (len(ids), sum(not activation.endswith("-map") for activation in ids)) == COUNTS[name]
    everything = [site.id for site in backbone.catalogue.all() if not site.encoder]
    torch.manual_seed(1)
    z = torch.randn(2, 4, *latent)
    size = (latent[0] * 8, latent[1] * 8)
    ours, stock = conditioning(name, 2, size)
    oracle = Oracle(tiny.build(name)["unet"])
    oracle(z, timestep, **stock)
    acts = backbone.forward_activations(None, everything, latents=z, timestep=timestep, **ours)
    assert list(acts) == everything
    for activation, act in acts.items():
        expected = oracle[activation]
        site = backbone.catalogue[activation]
        assert act.shape == expected.shape, activation
        torch.testing.assert_close(
            act, expected, rtol=1e-4, atol=1e-4, msg=lambda text, activation=activation: f"{activation}: {text}"
        )
        assert act.shape[1 if site.layout != "tokens" else 2] == site.channels, activation
        if site.layout == "map":
            assert tuple(act.shape[-2:]) == (size[0] // site.stride, size[1] // site.stride), activation


UNETS = [n for n in db.list_models() if db.get_declaration(n).checkpoint.family == "unet"]


@pytest.mark.parametrize("name", [n for n in UNETS if not n.startswith(("tinysd", "pgv2")) and "cleandift" not in n])
def test_a_pyramid_is_the_whole_published_path(name, tiny_folder, photo):
    """Encode, scale, noise, denoise, concatenate: by hand with stock parts, on a photograph that must be padded."""
    declaration = db.get_declaration(name)
    recipe, checkpoint = declaration.recipe, declaration.checkpoint
    networks = tiny.build(checkpoint.name)
    x = photo[..., :90, :130]
    coarsest = 8 * 2 ** (len(networks["unet"].config.block_out_channels) - 1)
    height, width = -(-90 // coarsest) * coarsest, -(-130 // coarsest) * coarsest
    padded = torch.zeros(1, 3, height, width)
    padded[..., :90, :130] = x
    backbone = db.create_model(name, checkpoint_path=tiny_folder(checkpoint.name))
    vae = Oracle(networks["vae"])
    with torch.no_grad():
        z = networks["vae"].encode(padded).latent_dist.mode()
    z = z * (networks["vae"].config.scaling_factor if recipe.scaled else 1)
    draws = (
        [backbone.canvas[i, :, : z.shape[2], : z.shape[3]] for i in range(recipe.ensemble)]
        if recipe.noise == "fixed"
        else [None]
    )
    scheduler = DDPMScheduler.from_config(package_configs(checkpoint)["scheduler"])
    expected: dict[str, list[torch.Tensor]] = {activation: [] for activation in recipe.ids}
    oracle = Oracle(networks["unet"])
    for noise in draws:
        z_t = z if noise is None else scheduler.add_noise(z, noise[None], torch.tensor([int(recipe.timestep)]))
        cond: dict[str, object] = {"encoder_hidden_states": backbone.conditioning.prompt_embeds}
        if hasattr(backbone.conditioning, "pooled_prompt_embeds"):
            time_ids = torch.tensor([[90.0, 130, 0, 0, 90, 130]])
            cond["added_cond_kwargs"] = {
                "text_embeds": backbone.conditioning.pooled_prompt_embeds,
                "time_ids": time_ids,
            }
        oracle(z_t, recipe.timestep, **cond)
        for activation in recipe.ids:
            act = (vae if activation.startswith("encoder") else oracle)[activation]
            stride = backbone.catalogue[activation].stride
            if act.ndim == 3:
                act = act.reshape(1, height // stride, width // stride, -1).permute(0, 3, 1, 2)
            expected[activation].append(act[..., : -(-90 // stride), : -(-130 // stride)])
    levels = [
        torch.cat([torch.stack(expected[activation]).mean(0) for activation in level.activations], 1)
        for level in recipe.levels
    ]
    pyramid = backbone(x)
    assert len(pyramid) == len(levels)
    for ours, theirs in zip(pyramid, levels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# name: (timestep the network receives, noise, sigma / alpha or alpha_bar as recipes state them, latent scale)
PUBLISHED = {
    "sd15_gdf": (51, "fixed", {"alpha_bar": 0.95052}, 0.18215),
    "sd15_legacy": (51, "fixed", {"alpha_bar": 0.95052}, 0.18215),
    "sdxl_gdf": (50, "fixed", {"sigma": 0.22558}, 0.13025),
    "sdxl_legacy": (50, "fixed", {"sigma": 0.22558}, 0.13025),
    "pgv2_gdf": (50, "fixed", {"sigma": 0.22558}, 0.13025),
    "pgv2_gdf_seg": (50, "fixed", {"sigma": 0.22558}, 0.13025),
    "sd21_dift": (261, "fixed", {"sigma": 0.72468}, 0.18215),
    "sd21_dift_geo": (0, "fixed", {}, 0.18215),
    "sd15_cleandift": (261, "none", {}, 0.18215),
    "sd21_cleandift": (261, "none", {}, 0.18215),
    "sd15_hyperfeatures": (-1, "none", {}, 0.18215),
    "sd13_odise": (0, "fixed", {}, 0.18215),
    "sd15_sd_dino": (100, "fixed", {}, 0.18215),
    "sd15_vpd": (1, "none", {}, 1.0),
    "sd15_tadp": (1, "none", {}, 0.18215),
    "ssd_1b_diffcut": (50, "fixed", {"sigma": 0.22558}, 0.13025),
    "sd21_genpercept": (1, "none", {}, 0.18215),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_timestep_noise_level_and_latent_scale_are_as_published(name):
    timestep, noise, level, scale = PUBLISHED[name]
    declaration = db.get_declaration(name)
    recipe = declaration.recipe
    assert (recipe.timestep, recipe.noise) == (timestep, noise)
    backbone = db.create_model(name, device="meta")
    shift, factor = backbone.architecture.image_encoder.scaling
    assert (shift, factor if recipe.scaled else 1.0) == (0.0, scale)
    if level:
        alpha, sigma = backbone.forward_process.levels(timestep)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-6)
        got = {"alpha_bar": alpha**2, "sigma": sigma / alpha}
        assert {k: round(got[k], 5) for k in level} == pytest.approx(level, abs=1e-5)


def test_nominal_timesteps_are_those_of_a_thousand_step_schedule():
    """GDF takes ``timesteps[1000 - t]`` of a schedule with 1000 steps; the schedulers themselves say what that is."""
    for name, cls in (("sd15", PNDMScheduler), ("sdxl", EulerDiscreteScheduler)):
        scheduler = cls.from_config(package_configs(db.get_checkpoint(name))["scheduler"])
        scheduler.set_timesteps(1000)
        for recipe in ("gdf", "legacy"):
            settings = db.get_declaration(f"{name}_{recipe}").recipe
            assert (settings.nominal_timestep or settings.timestep) == 50
            assert settings.timestep == int(scheduler.timesteps[1000 - 50])


def test_the_marginal_is_that_of_the_euler_scheduler():
    """(z + s noise) / sqrt(s² + 1), which is what SDXL's own scheduler does, equals alpha z + sigma noise."""
    config = package_configs(db.get_checkpoint("sdxl"))["scheduler"]
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[1000 - 50]
    torch.manual_seed(0)
    z, noise = torch.randn(2, 1, 4, 8, 8)
    theirs = scheduler.scale_model_input(scheduler.add_noise(z, noise, t[None]), t)
    alpha, sigma = db.create_model("sdxl_gdf", device="meta").forward_process.levels(50)
    torch.testing.assert_close(alpha * z + sigma * noise, theirs, rtol=1e-5, atol=1e-5)
