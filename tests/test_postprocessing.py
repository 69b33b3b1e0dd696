"""Post-processing as data: massive channels, directions of position, lengths, principal components, by arithmetic."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusion_backbones as db
from diffusion_backbones import extraction
from diffusion_backbones.backbone.fusion import FusedBackbone
from diffusion_backbones.backbone.fusion.timm_extractor import extractor
from diffusion_backbones.reports import summary
from diffusion_backbones.reports.settings import postprocessing
from diffusion_backbones.spec.fusion import Fusion

pytestmark = pytest.mark.usefixtures("one_thread", "costs_not_measured")
X = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
IMAGES = [torch.rand(1, 3, 64, 64 * (i + 1), generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
SIDE = 128
NETWORKS = {
    "sd15": (("up-level1-repeat2-res-out",), "up_blocks.1.resnets.2", "unet", "up_blocks.1.resnets.2.conv2.bias"),
    "sd3_medium": (("vit-block3-out",), "transformer_blocks.3", "transformer", "transformer_blocks.3.ff.net.2.bias"),
}
"""What is read of a network, the module that gives it, and a parameter that makes channels of it massive."""
MASSIVE = (3, 11)


def numbers(m: torch.Tensor) -> np.ndarray:
    return m.detach().double().numpy()


def lengths(m: torch.Tensor) -> np.ndarray:
    return np.linalg.norm(numbers(m), axis=1)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, tmp_path_factory):
    """(Checkpoint, folder, ids, path): a tiny network in which two channels of an activation are massive."""
    ids, path, component, bias = NETWORKS[request.param]
    folder = tiny.folder(request.param, tmp_path_factory.mktemp(request.param))
    file = folder / component / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[bias][list(MASSIVE)] += 500
    save_file(weights, file, {"format": "pt"})
    return request.param, folder, ids, path


def build(network, **given):
    checkpoint, folder, ids, _ = network
    recipe = db.Recipe("mine", [list(ids)], input_size=SIDE, **given)
    return db.create_model(checkpoint, recipe=recipe, checkpoint_path=folder)


class Raw:
    """What the stock module gives for images, before anything is done to it, as (B, C, h, w) in float64."""

    def __init__(self, network):
        self.backbone, self.kept = build(network), []
        self.backbone.denoiser.get_submodule(network[3]).register_forward_hook(lambda _, __, out: self.kept.append(out))

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        self.kept.clear()
        self.backbone(x)
        out = self.kept[0][1] if isinstance(self.kept[0], tuple) else self.kept[0]
        if out.ndim == 3:
            out = out.transpose(1, 2).unflatten(2, (x.shape[-2] // 16, x.shape[-1] // 16))
        return numbers(out)


@pytest.fixture(scope="module")
def raw(network) -> Raw:
    return Raw(network)


# Massive channels.


def calibration() -> torch.Tensor:
    """Waves of 1 to 32 periods, each octave half as strong, turned by the golden angle from one to the next."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    colors = np.zeros((3, SIDE, SIDE))
    for octave in range(6):
        for color in range(3):
            turn = (3 * octave + color) * math.radians(137.50776405003785)
            along = x * math.cos(turn) + y * math.sin(turn)
            colors[color] += np.sin(math.tau * 2**octave * along + turn) / 2**octave
    return torch.from_numpy(colors / abs(colors).max()).float()[None]


def test_massive_channels_are_those_beyond_ten_medians(network, raw):
    backbone = build(network, discard="auto")
    rms = np.sqrt((raw(calibration()) ** 2).mean((0, 2, 3)))
    expected = np.flatnonzero(rms > 10 * np.sort(rms)[(len(rms) - 1) // 2]).tolist()
    assert set(MASSIVE) <= set(expected)
    assert len(expected) < len(rms) / 2
    name = network[2][0]
    assert backbone.declaration.recipe.discard == ((name, tuple(expected)),)
    features = raw(X)
    features[:, expected] = 0
    [got] = backbone(X)
    np.testing.assert_allclose(numbers(got), features, rtol=1e-4, atol=1e-4)
    chosen = db.create_model(
        network[0], recipe=backbone.declaration.recipe.override(discard=expected), checkpoint_path=network[1]
    )
    assert torch.equal(chosen(X)[0], got)


def test_what_was_found_is_said_and_saved(network, tmp_path):
    backbone = build(network, discard="auto", ensemble=2)
    [got] = backbone(X)
    saved = backbone.save_pretrained(tmp_path / "saved")
    name = network[2][0]
    kept = json.loads((saved / "config.json").read_text())["recipe"]["discard"]
    assert list(kept) == [name]
    assert set(MASSIVE) <= set(kept[name])
    for other in (db.create_model(f"local-dir:{saved}"), pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert torch.equal(other(X)[0], got)
        assert other.declaration.recipe.discard == backbone.declaration.recipe.discard
    said = f"of {name} set to zero"
    assert said in postprocessing(backbone.declaration.recipe)
    assert said in (saved / "README.md").read_text()
    assert "calibration image of this package at 128 x 128 pixels" in (saved / "README.md").read_text()
    assert f"calibration image of this package at {SIDE} x {SIDE} pixels" in " ".join(
        text for _, text in summary.about(backbone.declaration)
    )


def test_it_is_found_over_all_timesteps_and_the_same_again(network):
    several = {"timesteps": (50, 300), "noise": "random", "seed": 3}
    backbones = [build(network, discard="auto", combine=c, **several) for c in ("mean", "concatenate", "mean")]
    found = [dict(b.declaration.recipe.discard)[network[2][0]] for b in backbones]
    assert found[0] == found[1] == found[2]
    assert set(MASSIVE) <= set(found[0])
    [both] = backbones[1](X)
    half = both.shape[1] // 2
    assert not both[:, [MASSIVE[0], half + MASSIVE[0]]].any()
    assert both.any()


def test_random_weights_have_no_massive_channels_yet():
    recipe = db.Recipe("mine", ["mid-vit-out"], discard="auto", debias=3, input_size=128)
    with pytest.warns(UserWarning, match="random weights"):
        backbone = db.create_model("tinysd", recipe=recipe)
    x = X[:1, :, :64, :64]
    for call in (lambda: backbone(x), lambda: backbone.forward_latents(backbone.encode(x))):
        with pytest.raises(ValueError, match="depends on the weights, and these were random; build it with pretrained"):
            call()
    assert backbone.forward_activations(x, ["mid-vit-out"])["mid-vit-out"].shape[0] == 1
    trained = db.create_model("tinysd", recipe=recipe, pretrained=True)
    weights = {k: v for k, v in trained.state_dict().items() if not k.startswith("fitted.")}
    backbone.load_state_dict(weights, strict=False)
    torch.testing.assert_close(backbone.fit()(x), trained(x))
    assert backbone.declaration.recipe == trained.declaration.recipe
    assert db.create_model("tinysd", recipe=recipe, device="meta")(x.to("meta"))[0].is_meta


# Directions of position.


def test_debias_is_the_projection_off_the_first_singular_vectors(network, raw):
    r = 4
    flat = raw(torch.zeros(1, 3, SIDE, SIDE))[0].reshape(len(raw(X)[0]), -1)  # C x places
    flat = flat / np.linalg.norm(flat, axis=0)
    u = np.linalg.svd(flat - flat.mean(1, keepdims=True), full_matrices=False)[0][:, :r]
    features = raw(X)
    left = features - np.einsum("cr,dr,bdhw->bchw", u, u, features)
    expected = left / np.linalg.norm(left, axis=1, keepdims=True)
    [got] = build(network, debias=r)(X)
    np.testing.assert_allclose(numbers(got), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lengths(got), 1, rtol=1e-5)


# Length.


def test_l2_divides_every_place_by_its_length(network, raw):
    features = raw(X)
    [got] = build(network, normalize="l2")(X)
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(numbers(got), expected, rtol=1e-4, atol=1e-5)


def test_l2_is_taken_of_every_activation_and_behind_what_is_dropped(network):
    checkpoint, folder, ids, _ = network
    second = {"sd15": "up-level1-repeat1-res-out", "sd3_medium": "vit-block2-out"}[checkpoint]
    recipe = db.Recipe("mine", [[ids[0], second]], normalize="l2", discard={ids[0]: MASSIVE})
    [got] = db.create_model(checkpoint, recipe=recipe, checkpoint_path=folder)(X)
    acts = db.create_model(checkpoint, recipe=[ids[0], second], checkpoint_path=folder)(X)[0]
    first, other = (numbers(m) for m in acts.chunk(2, 1))
    first[:, list(MASSIVE)] = 0
    expected = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (first, other)]
    np.testing.assert_allclose(numbers(got), np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


# Principal components.


def principal(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    mean = rows.mean(0)
    axes = np.linalg.svd(rows - mean, full_matrices=False)[2][:n]
    return mean, axes * np.sign(axes[np.arange(n), abs(axes).argmax(1)])[:, None]


def test_components_are_the_first_of_all_images_together(network, raw):
    backbone = build(network, components=5, normalize="l2", discard=MASSIVE)
    assert backbone.feature_info.channels() == [5]
    with pytest.raises(ValueError, match="principal components, which are not fitted yet; call fit"):
        backbone(X)
    backbone.fit(iter(IMAGES))
    features = list(map(raw, [*IMAGES, X]))
    for m in features:
        m[:, list(MASSIVE)] = 0
    unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in features]
    rows = np.concatenate([np.moveaxis(m, 1, -1).reshape(-1, m.shape[1]) for m in unit[:-1]])
    mean, axes = principal(rows, 5)
    expected = np.einsum("nc,bchw->bnhw", axes, unit[-1] - mean[:, None, None])
    np.testing.assert_allclose(numbers(backbone(X)[0]), expected, rtol=1e-3, atol=1e-4)


def test_components_stand_behind_debias(network):
    settings = {"debias": 2, "discard": MASSIVE}
    both, debiased = build(network, components=3, **settings).fit(X), build(network, **settings)
    rows = numbers(debiased(X)[0])
    mean, axes = principal(np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1]), 3)
    expected = np.einsum("nc,bchw->bnhw", axes, rows - mean[:, None, None])
    np.testing.assert_allclose(numbers(both(X)[0]), expected, rtol=1e-3, atol=1e-4)


# All of it together, in every use.

TWO = [["up-level1-repeat2-vit-out"], ["mid-vit-out"]]
SETTINGS = {"discard": "auto", "normalize": "l2", "debias": 2, "components": 3, "input_size": 128}


@pytest.fixture(scope="module")
def every():
    """A trained network of two levels, with everything that can be done to them."""
    backbone = db.create_model("tinysd", recipe=db.Recipe("mine", TWO, ensemble=2, **SETTINGS), pretrained=True)
    return backbone.fit([X, IMAGES[0]])


def close(maps, expected, tolerance: float = 1e-5) -> None:
    assert len(maps) == len(expected) > 0
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_calls_agree(every):
    maps = every(X)
    assert [m.shape[1] for m in maps] == every.feature_info.channels() == [3, 3]
    for other in (
        every(X, chunk=1),
        every.forward_latents(every.encode(X), X.shape[-2:]),
        [torch.cat(pair) for pair in zip(every(X[:1]), every(X[1:]), strict=True)],
        every.forward_intermediates(X, intermediates_only=True),
        [every(X, [0])[0], every(X, [1])[0]],
        pickle.loads(pickle.dumps(every))(X),
        copy.deepcopy(every)(X),
    ):
        close(other, maps, 1e-4)


def test_it_is_saved_with_the_backbone(every, tmp_path):
    maps, saved = every(X), every.save_pretrained(tmp_path / "saved")
    for other in (
        db.create_model(f"local-dir:{saved}"),
        db.create_model(f"local-dir:{every.save_pretrained(tmp_path / 'shards', max_shard_size='100KB')}"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other(X), maps, strict=True))
        assert other.declaration.recipe == every.declaration.recipe.override(levels=TWO)
    assert torch.equal(db.create_model(f"local-dir:{saved}", out_indices=[1])(X)[0], maps[1])
    strided = db.create_model(f"local-dir:{saved}", out_strides=(4, 64), encoder_levels=True)
    assert strided.feature_info.channels()[-1] == 3
    pruned = copy.deepcopy(every)
    pruned.prune_intermediate_layers([0])
    again = db.create_model(f"local-dir:{pruned.save_pretrained(tmp_path / 'pruned')}")
    assert torch.equal(again(X)[0], maps[0])
    assert len([name for name in again.state_dict() if name.startswith("fitted.")]) == 6


def test_a_folder_that_lost_what_was_fitted_is_refused(every, tmp_path):
    saved = every.save_pretrained(tmp_path / "saved")
    weights, config = load_file(saved / "model.safetensors"), json.loads((saved / "config.json").read_text())
    lost = next(name for name in weights if name.startswith("fitted.") and name.endswith("axes"))
    save_file({k: v for k, v in weights.items() if k != lost}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights are not those of this config.json: fitted\..* is missing"):
        db.create_model(f"local-dir:{saved}")
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    for changed in ({"components": 4}, {"debias": 0, "components": None}):
        config["recipe"] |= changed
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="the weights are not those of this config.json"):
            db.create_model(f"local-dir:{saved}")
    del config["recipe"]["debias"], config["recipe"]["components"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights are not those of this config.json"):
        db.create_model(f"local-dir:{saved}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(every, dtype, tmp_path):
    half = db.create_model(f"local-dir:{every.save_pretrained(tmp_path / 'saved')}", dtype=dtype)
    maps = half(X)
    assert {m.dtype for m in maps} == {dtype}
    for m, exact in zip(maps, every(X), strict=True):
        assert (m.float() - exact).norm() / exact.norm() < 0.2
    cast = copy.deepcopy(every).to(dtype)(X)
    assert all(m.isfinite().all() and m.dtype == dtype for m in cast)


def test_gradients_go_through(every):
    recipe = every.declaration.recipe
    trained = db.create_model("tinysd", recipe=recipe, pretrained=True, trainable=True).fit(X)
    sum(m.square().mean() for m in trained(X)).backward()
    grads = [p.grad for p in trained.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert not any(name.startswith("fitted.") for name, p in trained.named_parameters())


def test_a_call_is_one_graph(every):
    torch._dynamo.reset()
    close(torch.compile(every, fullgraph=True, backend="eager")(X), every(X))


def test_it_is_exported(every):
    from diffusion_backbones.factory.export import trace

    close(trace(every, (64, 128), batch=2).module()(X), every(X), 1e-4)


def test_a_fusion_reads_it(every):
    vit = extractor(db.TimmModel("test_vit", input_size=SIDE))
    members = tuple(db.Member(backbone.declaration, input_size=SIDE) for backbone in (every, vit))
    fused = FusedBackbone(Fusion("both", members, normalize="none"), [every, vit])
    assert [m[:, :3].equal(alone) for m, alone in zip(fused(X), every(X), strict=True)] == [True, True]


def test_settings_of_create_model(every):
    backbone = db.create_model("tinysd_gdf", pretrained=True, discard="auto", normalize="l2", debias=2, components=4)
    assert backbone.feature_info.channels() == [4] * 3
    recipe = backbone.declaration.recipe
    assert (recipe.normalize, recipe.debias, recipe.components) == ("l2", 2, 4)
    assert {name for name, _ in recipe.discard} == set(recipe.ids)


# Recipes.


def test_recipes_without_it_stay_what_they_were():
    recipe = db.Recipe("x", ["mid-vit-out"], discard=[3, 5])
    assert recipe.digest == "456a1204d447"
    assert not {"debias", "components"} & recipe.to_dict().keys()
    assert recipe.to_dict()["discard"] == [3, 5]
    changes = ({"discard": "auto"}, {"discard": {"mid-vit-out": [3]}}, {"debias": 1}, {"components": 2})
    others = [recipe.override(**change) for change in (*changes, {"normalize": "l2"})]
    assert len({r.digest for r in (recipe, *others)}) == 6
    for other in others:
        assert db.Recipe.from_dict(json.loads(json.dumps(other.to_dict()))) == other
        assert hash(pickle.loads(pickle.dumps(other))) == hash(other)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (
            {"discard": "automatic"},
            "discard must be channels, channels of each activation id, or 'auto', got 'automatic'",
        ),
        ({"discard": {"mid-vit-out": [-1]}}, r"discard\['mid-vit-out'\]\[0\]: expected int >= 0, got -1"),
        ({"discard": {"mid-vit-out": 3}}, r"discard\['mid-vit-out'\]: expected list, got 3"),
        (
            {"discard": {"unet-out": [3]}},
            "discard names 'unet-out', which the recipe does not read; it reads mid-vit-out",
        ),
        ({"discard": {3: [3]}}, "discard names 3, which the recipe does not read"),
        ({"discard": {"mid-vit-out": [9999]}}, r"discard=\(9999,\), and mid-vit-out has channels 0 to"),
        ({"debias": -1}, "debias: expected int >= 0, got -1"),
        ({"debias": 2.5}, "debias: expected int, got 2.5"),
        ({"debias": True}, "debias: expected int, got True"),
        (
            {"debias": 9999},
            "debias=9999, and the level of mid-vit-out has 112 channels, so that it must be at most 111",
        ),
        ({"components": 0}, "components: expected int >= 1, got 0"),
        ({"components": "8"}, "components: expected int or None, got '8'"),
        ({"components": 113}, "components=113, and the level of mid-vit-out has 112 channels.*at most 112"),
        ({"normalize": "l1"}, "normalize: expected one of none, layer, adaptive, l2, got 'l1'"),
    ],
)
def test_bad_settings(given, error):
    with pytest.raises(ValueError, match=error):
        db.create_model("tinysd", recipe=db.Recipe("x", ["mid-vit-out"], **given), device="meta")


def test_too_little_to_fit_on(every):
    before = every(X)
    other = copy.deepcopy(every)
    small = X[:1, :, :64, :64]  # one place of stride 64
    with pytest.raises(
        ValueError, match="level of mid-vit-out: 3 principal components need at least 4 positions, got 1"
    ):
        other.fit(small)
    with pytest.raises(ValueError, match="need at least 4 positions, got 0; fit on more or on larger images"):
        other.fit([])
    with pytest.raises(ValueError, match="need as many directions in which positions differ"):
        other.fit([small] * 8)
    close(other(X), before)
    with pytest.raises(ValueError, match="has components, which are fitted on images; give some"):
        other.fit()
    with pytest.raises(TypeError, match="expected"):
        other.fit(["a.jpg"])
    with pytest.raises(ValueError, match="is on the meta device and has no values to fit"):
        db.create_model("tinysd", recipe=every.declaration.recipe, device="meta").fit(X)
    none = db.create_model("tinysd", recipe=["mid-vit-out"], pretrained=True)
    with pytest.raises(ValueError, match="has no components to fit on images; build it with components="):
        none.fit(X)
    with pytest.raises(ValueError, match="debias: 4 principal components need at least 5 positions, got 4; take fewer"):
        db.create_model("tinysd", recipe=db.Recipe("x", ["mid-vit-out"], debias=4, input_size=128), pretrained=True)


def test_a_folder_of_images(every, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 96 + 32 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    files = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(folder.iterdir())]
    by_hand = copy.deepcopy(every).fit([x[None] / 127.5 - 1 for x in files])
    close(extraction.fit(copy.deepcopy(every), folder)(X), by_hand(X), 1e-4)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        extraction.fit(every, tmp_path / "none")
