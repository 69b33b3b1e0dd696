"""Noise by DDIM inversion: as diffusers' ``DDIMInverseScheduler`` and stock network give it, step by step."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionXLPipeline
from stock_pipeline import LEVELS, pipeline
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.ops.inversion import invert
from diffusion_backbones.spec.configs import package_configs
from diffusion_backbones.spec.inversion import Inversion
from diffusion_backbones.surgery import constant_folding
from diffusion_backbones.surgery.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
SD15 = package_configs(db.get_checkpoint("sd15"))["scheduler"]


def close(maps, expected) -> None:
    assert len(maps) == len(expected) > 0
    for ours, stock in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4 * max(1, float(stock.abs().max())))


# The steps, against diffusers' scheduler.

CONFIGS = {
    "sd15": SD15,
    "sd21": package_configs(db.get_checkpoint("sd21"))["scheduler"],
    "sdxl": package_configs(db.get_checkpoint("sdxl"))["scheduler"],
    "ddpm": package_configs(db.get_checkpoint("ddpm_celebahq_256"))["scheduler"],
    "trailing": {**SD15, "timestep_spacing": "trailing"},
    "clipped": {**SD15, "clip_sample": True, "clip_sample_range": 0.7},
    "sample": {**SD15, "prediction_type": "sample"},
    "from one": {**SD15, "set_alpha_to_one": True},
    "no signal at last": {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "nothing said": {key: SD15[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    | {"_class_name": "DDIMScheduler", "num_train_timesteps": 600},
}


@pytest.mark.parametrize("steps", [1, 3, 5, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_is_that_of_diffusers(name, steps, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(dict(CONFIGS[name])))
    stock, ours = DDIMInverseScheduler.from_pretrained(tmp_path), Inversion.of(CONFIGS[name], steps)
    stock.set_timesteps(steps)
    assert list(ours.timesteps) == stock.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    for step, t in enumerate(ours.timesteps):
        z, output = (torch.randn(2, 4, 3, 5, generator=generator) for _ in range(2))
        torch.testing.assert_close(
            invert(ours, step, z, output), stock.step(output, t, z).prev_sample, rtol=1e-4, atol=1e-4
        )


def test_a_sampler_without_clipping_asks_for_none():
    """SD 1.5's own sampler, PNDM, never clips, whether its config carries the word or not."""
    silent = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert (SD15["_class_name"], SD15["clip_sample"]) == ("PNDMScheduler", False)
    assert Inversion.of(silent, 5) == Inversion.of(SD15, 5)


# The whole way, against stock networks.


@torch.no_grad()
def stock_maps(name: str, folder: Path, x: Tensor, steps: int, stops: tuple[int, ...], scale: bool = True):
    """The maps of a pyramid at each of some timesteps: inverted by diffusers, and read with plain hooks."""
    pipe, b, size = pipeline(name, folder), len(x), x.shape[-2:]
    scheduler = DDIMInverseScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    kept: dict[str, Tensor] = {}
    levels = LEVELS[f"{name}_gdf"]
    for path in (path for level in levels for path in level):
        pipe.unet.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: kept.__setitem__(path, out))
    if isinstance(pipe, StableDiffusionXLPipeline):
        given = {"device": "cpu", "do_classifier_free_guidance": False}
        text, _, pooled, _ = pipe.encode_prompt("a photo of a cat", **given)
        ids = pipe._get_add_time_ids(tuple(size), (0, 0), tuple(size), text.dtype, pooled.shape[-1])
        added = {"text_embeds": pooled.expand(b, -1), "time_ids": ids.expand(b, -1)}
    else:
        text, added = pipe.encode_prompt("a photo of a cat", "cpu", 1, False)[0], None

    def network(z: Tensor, t: int) -> Tensor:
        return pipe.unet(z, t, text.expand(b, -1, -1), added_cond_kwargs=added).sample

    z = pipe.vae.encode(x).latent_dist.mode() * (pipe.vae.config.scaling_factor if scale else 1)
    found = {}
    for t in scheduler.timesteps.tolist():
        if t > max(stops):
            break
        z = scheduler.step(network(z, t), t, z).prev_sample
        if t in stops:
            network(z, t)
            found[t] = [torch.cat([as_map(kept[path], *size) for path in level], 1) for level in levels]
    return [found[t] for t in stops]


def as_map(act: Tensor, height: int, width: int) -> Tensor:
    if act.ndim == 4:
        return act
    stride = round((height * width / act.shape[1]) ** 0.5)
    return act.transpose(1, 2).unflatten(2, (height // stride, width // stride))


@pytest.mark.parametrize(
    ("name", "steps", "t", "scale"),
    [("sd15", 5, 601, True), ("sd15", 50, 241, True), ("sd15", 5, 201, False), ("sdxl", 5, 401, True)],
)
def test_a_pyramid_is_read_where_diffusers_inversion_leads(name, steps, t, scale, tiny_folder):
    folder = tiny_folder(name)
    settings = {"noise": "inversion", "inversion_steps": steps, "timestep": t, "scaled": scale}
    backbone = db.create_model(f"{name}_gdf", checkpoint_path=folder, prompt="a photo of a cat", **settings)
    [expected] = stock_maps(name, folder, X, steps, (t,), scale)
    close(backbone(X), expected)


def test_a_network_that_predicts_the_velocity(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "sd15"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    settings = {"noise": "inversion", "inversion_steps": 5, "timestep": 401}
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder, prompt="a photo of a cat", **settings)
    close(backbone(X), stock_maps("sd15", folder, X, 5, (401,))[0])


# As a backbone.

STOPS = (401, 1)


@pytest.fixture(scope="module")
def made(tiny_folder):
    def make(**keywords):
        settings = {"noise": "inversion", "inversion_steps": 5, "timesteps": STOPS, "prompt": "a photo of a cat"}
        return db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), **(settings | keywords))

    return make


@pytest.fixture(scope="module")
def backbone(made):
    return made()


def test_several_timesteps_are_read_on_one_way(backbone, tiny_folder):
    each = stock_maps("sd15", tiny_folder("sd15"), X, 5, STOPS)
    close(backbone(X), [(a + b) / 2 for a, b in zip(*each, strict=True)])
    counted = copy.deepcopy(backbone)
    calls = []
    counted.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    counted(X)
    assert len(calls) == 3 + 2 == Plan.of(backbone.declaration, backbone.configs).passes


def test_other_ways_into_the_network_give_the_same(backbone, made):
    maps = backbone(X)
    for other in (
        backbone(X, chunk=1),
        [torch.cat(m) for m in zip(*(backbone(x[None]) for x in X), strict=True)],
        backbone.forward_latents(backbone.encode(X)),
    ):
        close(other, maps)
    folded = made(fold=True)
    assert constant_folding.constants(folded.denoiser)["time_embedding"].outputs[0].shape[0] == 3
    close(folded(X), maps)


def test_a_call_is_one_graph():
    settings = {"noise": "inversion", "inversion_steps": 5, "timestep": 201}
    backbone, x = db.create_model("tinysd_gdf", pretrained=True, **settings), X[..., :64]
    torch._dynamo.reset()
    close(torch.compile(backbone, fullgraph=True, backend="eager")(x), backbone(x))


def test_the_network_stays_whole(made):
    whole, cut = made(out_indices=[2]), made(out_indices=[2], noise="fixed")
    assert hasattr(whole.denoiser.conv_out, "weight")
    assert whole.plan.passes == 5
    assert cut.plan.passes == 2
    whole.prune_intermediate_layers([0])
    assert hasattr(whole.denoiser.conv_out, "weight")
    close(whole(X, noise="fixed"), cut(X))


def test_it_is_saved_and_loaded(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    again = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'saved')}")
    assert again.declaration.recipe.inversion_steps == 5
    close(again(X), backbone(X))


# Bad input.


@pytest.mark.parametrize(
    ("name", "settings", "kind", "error"),
    [
        (
            "sd15_gdf",
            {"timestep": 300},
            ValueError,
            "does not come by timestep 300; the nearest that it passes: 281, 301",
        ),
        ("sd15_gdf", {"timestep": 1, "ensemble": 2}, ValueError, "an ensemble of 2 averages over noise that is drawn"),
        ("sd15_gdf", {"timestep": 1, "inversion_steps": 0}, ValueError, "inversion_steps: expected int >= 1, got 0"),
        ("sd15_gdf", {"timestep": 1, "inversion_steps": 1001}, ValueError, "inversion_steps must be at most 1000"),
        ("sd15_gdf", {"timestep": -1}, ValueError, "timestep -1 lies before the first step"),
        ("flux_dev_ditf", {"ensemble": 1}, ValueError, "trained on a rectified flow; use noise='fixed'"),
        ("sd15_gdf", {"timestep": 1, "trainable": True}, TypeError, "trainable=True trains one pass of the network"),
    ],
)
def test_bad_settings(name, settings, kind, error):
    with pytest.raises(kind, match=error):
        db.create_model(name, device="meta", noise="inversion", **settings)


@pytest.mark.parametrize("keys", [{"timestep_spacing": "linspace"}, {"prediction_type": "v"}, {"steps_offset": 300}])
def test_a_schedule_without_inversion(keys):
    with pytest.raises(ValueError, match=f"has {next(iter(keys))}"):
        Inversion.of({**SD15, **keys}, 5)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"noise": torch.zeros(4, 8, 16)}, "finds its noise by inversion, so none can be given"),
        ({"ensemble": 2}, "ensemble= is for noise that is drawn, and noise='inversion' draws none"),
        ({"generator": torch.Generator()}, "generator= is for noise that is drawn"),
        ({"timestep": 300}, "does not come by timestep 300; the nearest that it passes: 201, 401"),
        ({"timestep": torch.tensor([1, 201])}, "takes timesteps as numbers"),
        ({"timestep": 1.5}, "does not come by timestep 1.5"),
    ],
)
def test_bad_calls(call, error, backbone):
    with pytest.raises(ValueError, match=error):
        backbone(X, **call)


def test_a_cut_network_cannot_be_inverted(tiny_folder):
    cut = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    with pytest.raises(ValueError, match="runs the whole network, and sd15_gdf is cut behind its last activation"):
        cut(X, noise="inversion")
