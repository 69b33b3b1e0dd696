"""Several timesteps: one encode, one pass each on the same noise, their mean or all along channels."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from stock_pipeline import LEVELS, pipeline, stock_pyramid
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.reports import backbone_card, costs
from diffusion_backbones.surgery import constant_folding
from diffusion_backbones.surgery.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = (261, 1, 600)
IDS = ["up-level3-repeat0-vit-block0-self-k", "up-level1-repeat2-res-out", "mid-vit-block0-self-map"]
X = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))


def close(maps, expected) -> None:
    assert len(maps) == len(expected) > 0
    for ours, stock in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder("sd15")


@pytest.fixture(scope="module")
def single(folder):
    return db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.fixture(scope="module")
def averaged(folder):
    return db.create_model("sd15_gdf", checkpoint_path=folder, timesteps=STEPS)


@pytest.fixture(scope="module")
def concatenated(folder):
    return db.create_model("sd15_gdf", checkpoint_path=folder, timesteps=STEPS, combine="concatenate")


class Count:
    """Counts the calls of a network."""

    def __init__(self, network):
        self.calls = 0
        network.register_forward_pre_hook(self._called)

    def _called(self, *_):
        self.calls += 1


# Against stock diffusers.


@pytest.fixture(scope="module")
def stock(folder) -> list[list[list[Tensor]]]:
    """The maps of diffusers' pipeline, by level, activation and timestep."""
    pipe = pipeline("sd15", folder)
    paths = [[path] for level in LEVELS["sd15_gdf"] for path in level]
    each = []
    for t in STEPS:
        alone = [stock_pyramid(pipe, paths, x[None], NOISE[None], t, "") for x in X]
        each.append([torch.cat(act) for act in zip(*alone, strict=True)])
    acts = iter(zip(*each, strict=True))
    return [[list(next(acts)) for _ in level] for level in LEVELS["sd15_gdf"]]


def test_the_mean_is_that_of_diffusers_pipeline(averaged, stock):
    expected = [torch.cat([torch.stack(steps).mean(0) for steps in level], 1) for level in stock]
    close(averaged(X, noise=NOISE), expected)


def test_the_concatenation_is_that_of_diffusers_pipeline(concatenated, stock):
    expected = [torch.cat([torch.cat(steps, 1) for steps in level], 1) for level in stock]
    close(concatenated(X, noise=NOISE), expected)
    assert concatenated.feature_info.channels() == [m.shape[1] for m in expected]


@torch.no_grad()
def test_each_timestep_is_modulated_by_itself_before_the_mean(tiny_folder):
    """DiTF's post-processing, whose shift and scale depend on the timestep, on a whole FLUX with plain hooks."""
    path, steps = tiny_folder("flux_dev"), (260, 100)
    recipe = tiny.recipe("flux_dev_ditf").override(timesteps=steps, ensemble=1)
    backbone = db.create_model("flux_dev", recipe=recipe, checkpoint_path=path)
    network = diffusers.FluxTransformer2DModel.from_pretrained(path / "transformer")
    vae = diffusers.AutoencoderKL.from_pretrained(path / "vae")
    kept = {}
    for name in ("single_transformer_blocks.8", "single_transformer_blocks.9.norm.linear"):
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out))
    z = (vae.encode(X).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(2))
    given = {name: t.repeat(2, *[1] * (t.ndim - 1)) for name, t in backbone.conditioning.items()}
    maps = []
    for t in steps:
        z_t = (1 - t / 1000) * z + t / 1000 * noise
        network(
            diffusers.FluxPipeline._pack_latents(z_t, *z_t.shape),
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            timestep=torch.full((2,), t / 1000),
            img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 8, "cpu", torch.float32),
            txt_ids=torch.zeros(given["prompt_embeds"].shape[1], 3),
            guidance=given["guidance"],
        )
        tokens = kept["single_transformer_blocks.8"][1].clone()
        tokens[..., list(recipe.discard)] = 0
        shift, scale = kept["single_transformer_blocks.9.norm.linear"].chunk(3, -1)[:2]
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        maps.append(normed.transpose(1, 2).unflatten(2, (4, 8)))
    close(backbone(X, noise=noise), [(maps[0] + maps[1]) / 2])


# One encode, one pass a timestep.


@pytest.mark.parametrize("combine", ["averaged", "concatenated"])
def test_an_image_is_encoded_once_and_denoised_once_a_timestep(combine, request):
    backbone = copy.deepcopy(request.getfixturevalue(combine))
    encodes, passes = Count(backbone.encoder.encoder), Count(backbone.denoiser)
    backbone(X)
    assert (encodes.calls, passes.calls) == (1, len(STEPS))
    backbone(X, timesteps=STEPS, ensemble=2, chunk=1)
    assert (encodes.calls, passes.calls) == (2, len(STEPS) * (1 + 2 * len(X)))


def test_costs_are_those_of_one_pass_times_timesteps(averaged):
    one = db.get_declaration("sd15_gdf")
    several = replace(one, recipe=one.recipe.override(timesteps=STEPS, ensemble=2))
    card = backbone_card.card(several)
    assert f"denoiser 6 × {costs.costs(one).denoiser_gflops:,.0f}"[:14] in card
    assert "261, 1, 600, averaged" in card
    assert Plan.of(several).passes == 6


# A call.


@pytest.mark.parametrize(
    "steps",
    [list(STEPS), np.array(STEPS), torch.tensor(STEPS), torch.tensor([[261, 261], [1, 1], [600, 600]])],
    ids=["list", "numpy", "tensor", "one per image"],
)
def test_a_call_gives_its_own(steps, single, averaged):
    close(single(X, timesteps=steps), averaged(X))


def test_other_ways_into_the_network_give_the_same(averaged, concatenated, single):
    for backbone in (averaged, concatenated):
        maps = backbone(X)
        z = backbone.encode(X)
        for other in (
            backbone.forward_latents(z),
            backbone(latents=z),
            backbone(X, chunk=1),
            pickle.loads(pickle.dumps(backbone))(X),
            backbone.forward_intermediates(X, intermediates_only=True),
        ):
            close(other, maps)
    each = [single.forward_activations(X, IDS[:2], timestep=t) for t in STEPS]
    for backbone, combine in ((averaged, lambda m: torch.stack(m).mean(0)), (concatenated, lambda m: torch.cat(m, -1))):
        acts = backbone.forward_activations(X, IDS[:1])
        torch.testing.assert_close(acts[IDS[0]], combine([acts[IDS[0]] for acts in each]), rtol=1e-4, atol=1e-4)
    maps = concatenated.forward_activations(X, IDS, as_maps=True)
    assert [maps[name].shape[1] for name in IDS] == [3 * single.catalogue[name].channels for name in IDS]


def test_random_noise_is_drawn_once(single):
    seeded = {"noise": "random", "ensemble": 2}
    maps = single(X, timesteps=(50, 300), generator=torch.Generator().manual_seed(5), **seeded)
    each = [single(X, timestep=t, generator=torch.Generator().manual_seed(5), **seeded) for t in (50, 300)]
    close(maps, [(a + b) / 2 for a, b in zip(*each, strict=True)])


def test_activations_are_visited_at_each_timestep(averaged):
    seen = []
    averaged.visit_activations(X, IDS[:2], lambda site, act: seen.append((site.id, tuple(act.shape))))
    assert [name for name, _ in seen] == [IDS[1], IDS[0]] * len(STEPS)  # in forward order


def test_levels_of_the_image_encoder_are_read_once(folder):
    strides = {"encoder_levels": True, "out_strides": (4, 8)}
    backbone = db.create_model(
        "sd15_gdf", checkpoint_path=folder, timesteps=STEPS, combine="concatenate", out_indices=[0], **strides
    )
    one = db.create_model("sd15_gdf", checkpoint_path=folder, out_indices=[0], **strides)
    fine, coarse = backbone(X)
    assert torch.equal(fine, one(X)[0])
    assert backbone.feature_info.channels() == [fine.shape[1], coarse.shape[1]]
    assert coarse.shape[1] == 3 * one(X)[1].shape[1]


def test_gradients_come_from_every_timestep(averaged, single):
    z = single.encode(X[:1]).detach()
    gradients = []
    for maps in (lambda z: averaged.forward_latents(z), lambda z: single.forward_latents(z, timesteps=STEPS)):
        leaf = z.clone().requires_grad_()
        sum(m.square().mean() for m in maps(leaf)).backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


# A backbone.


def test_it_is_saved_and_loaded_and_made_by_timm(concatenated, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    maps = concatenated(X)
    saved = concatenated.save_pretrained(tmp_path / "saved")
    again = db.create_model(f"local-dir:{saved}")
    assert again.declaration.recipe == concatenated.declaration.recipe
    close(again(X), maps)
    keywords = {"timesteps": STEPS, "combine": "concatenate", "pretrained_cfg_overlay": {"file": str(folder)}}
    close(timm.create_model("sd15_gdf", features_only=True, **keywords)(X), maps)


def test_files_of_one_timestep_are_as_they_were(single, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    saved = single.save_pretrained(tmp_path / "saved")
    recipe = json.loads((saved / "config.json").read_text())["recipe"]
    assert not {"timesteps", "combine"} & recipe.keys()


def test_it_is_exported(concatenated):
    from diffusion_backbones.factory.export import describe, trace

    program = trace(concatenated, (64, 128), batch=2)
    close(program.module()(X), concatenated(X))
    assert "timestep 261, 1, 600" in describe(concatenated)["fixed"]


@pytest.mark.parametrize("combine", ["mean", "concatenate"])
def test_folded_constants_have_a_row_for_each_timestep(combine, folder, single, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    keywords = {"timesteps": STEPS, "combine": combine, "checkpoint_path": folder}
    plain, folded = (db.create_model("sd15_gdf", fold=fold, **keywords) for fold in (False, True))
    maps = plain(X)
    close(folded(X), maps)
    constants = constant_folding.constants(folded.denoiser)
    assert constants["time_embedding"].outputs[0].shape[0] == len(STEPS)
    assert {path.rpartition(".")[2] for path, c in constants.items() if not c.by_step} == {"to_k", "to_v"}
    close(folded(X, chunk=1), maps)
    close(copy.deepcopy(folded)(X), maps)
    close(pickle.loads(pickle.dumps(folded))(X), maps)
    close(db.create_model(f"local-dir:{folded.save_pretrained(tmp_path / 'saved')}")(X), maps)
    with pytest.raises(TypeError, match="a call cannot change timesteps"):
        folded(X, timesteps=STEPS)
    with pytest.raises(RuntimeError, match="runs only inside a call of its backbone"):
        folded.denoiser(NOISE[None], 1, folded.conditioning.prompt_embeds)


@pytest.mark.parametrize("fold", [False, True])
def test_a_call_is_one_graph(fold):
    settings = {"timesteps": (50, 300), "out_indices": [2], "fold": fold}
    backbone, x = db.create_model("tinysd_gdf", pretrained=True, **settings), X[..., :64]
    torch._dynamo.reset()
    close(torch.compile(backbone, fullgraph=True, backend="eager")(x), backbone(x))


def test_folded_calls_in_several_threads_do_not_mix(folder):
    folded = db.create_model("sd15_gdf", checkpoint_path=folder, timesteps=STEPS, fold=True, out_indices=[2])
    [expected], results = folded(X), []
    threads = [threading.Thread(target=lambda: results.append(folded(X))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for [result] in results)


# A recipe.


def test_a_recipe_of_one_timestep_stays_what_it_was():
    levels = ["mid-vit-out"]
    one = db.Recipe("x", levels, timestep=7)
    for same in (
        db.Recipe("x", levels, timesteps=[7]),
        one.override(timesteps=(7,)),
        one.override(combine="concatenate"),
    ):
        assert (same, same.digest, same.to_dict()) == (one, one.digest, one.to_dict())
    assert (one.timesteps, one.all_timesteps) == ((), (7,))


def test_settings_of_several_timesteps_go_together():
    recipe = db.Recipe("x", ["mid-vit-out"], timesteps=range(300, 0, -100), combine="concatenate")
    assert (recipe.timestep, recipe.timesteps) == (300, (300, 200, 100))
    assert db.Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.override(timestep=5).timesteps, recipe.override(timesteps=(8, 9)).timestep) == ((), 8)
    others = [recipe.override(**s) for s in ({"timesteps": (300, 100, 200)}, {"combine": "mean"}, {"timestep": 300})]
    assert len({other.digest for other in (recipe, *others)}) == 4


# Bad input.


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"timesteps": ()}, r"timesteps must hold at least one timestep, got \(\)"),
        ({"timesteps": []}, r"timesteps must hold at least one timestep, got \[\]"),
        ({"timesteps": (5, 6, 5)}, r"timesteps must differ from each other, got \(5, 6, 5\)"),
        ({"timesteps": (5, 5.0)}, "timesteps must differ from each other"),
        ({"timesteps": (5, 1000)}, r"timesteps\[1\]: expected int <= 999, got 1000"),
        ({"timesteps": (5, -1)}, "timestep -1 lies before the first step"),
        ({"timesteps": (5, float("nan"))}, r"timesteps\[1\]: expected float .*got nan"),
        ({"timesteps": (5, "6")}, r"timesteps\[1\]: expected int or float, got '6'"),
        ({"timesteps": (True, 2)}, r"timesteps\[0\]: expected int or float, got True"),
        ({"timesteps": 5}, "timesteps: expected list, got 5"),
        ({"timesteps": "5"}, "timesteps: expected list, got '5'"),
        ({"timesteps": b"5"}, "timesteps: expected list, got b.5."),
        ({"timesteps": {5: 6}}, "timesteps: expected list"),
        ({"timesteps": (5, 6), "timestep": 7}, r"timestep=7 is not the first of timesteps=\(5, 6\); give one"),
        ({"timesteps": (5, 6), "combine": "sum"}, "combine: expected one of mean, concatenate, got 'sum'"),
        ({"combine": "concat"}, "Did you mean concatenate"),
        ({"inversion_steps": 5}, "inversion_steps=5 is for noise='inversion', and noise='fixed'"),
        ({"combine": 3}, "combine: expected one of mean, concatenate, got 3"),
    ],
)
def test_bad_settings(settings, error):
    with pytest.raises(ValueError, match=error):
        db.create_model("sd15_gdf", device="meta", **settings)


@pytest.mark.parametrize(
    ("call", "kind", "error"),
    [
        ({"timesteps": ()}, ValueError, r"timesteps must be one or more that differ from each other, got \(\)"),
        ({"timesteps": [3, 4, 3]}, ValueError, "timesteps must be one or more that differ"),
        ({"timesteps": torch.tensor([3, 3])}, ValueError, "timesteps must be one or more that differ"),
        ({"timesteps": 5}, TypeError, "timesteps must be a sequence of timesteps such as .*got 5"),
        ({"timesteps": "50"}, TypeError, "timesteps must be a sequence"),
        ({"timesteps": b"50"}, TypeError, "timesteps must be a sequence"),
        ({"timesteps": {5, 6}}, TypeError, "timesteps must be a sequence"),
        ({"timesteps": torch.tensor(5)}, TypeError, "timesteps must be a sequence"),
        ({"timesteps": [5, "6"]}, TypeError, "must be a real number"),
        ({"timesteps": [5, True]}, TypeError, "must be a real number"),
        ({"timesteps": [5, float("inf")]}, ValueError, "must be finite"),
        ({"timesteps": [5, 1000]}, ValueError, "0 to 999.*1000"),
        ({"timesteps": [-1, 5]}, ValueError, "noise='none'"),
        ({"timesteps": [[1, 2, 3], [4, 5, 6]]}, ValueError, "one number or 2"),
        ({"timesteps": [5, 6], "timestep": 5}, TypeError, "give either timestep= or timesteps=, not both"),
        ({"timestps": [5, 6]}, TypeError, "Did you mean timesteps"),
    ],
)
def test_bad_calls(call, kind, error, single):
    with pytest.raises(kind, match=error):
        single(X, **call)


@pytest.mark.parametrize("call", [{"timestep": 5}, {"timesteps": [5]}, {"timesteps": [1, 2, 3, 4]}])
def test_a_concatenation_takes_as_many_as_its_channels_are_for(call, concatenated):
    with pytest.raises(ValueError, match="concatenates the channels of 3 timesteps, so a call gives as many"):
        concatenated(X, **call)
