"""Selecting activations: measured properties that are known by construction, rules, tasks, the choice, and the whole of
it on tinysd.
"""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.reports import costs
from diffusion_backbones.selection import choose, data, rules, run, tasks
from diffusion_backbones.selection.choose import Budget
from diffusion_backbones.selection.compare import FeatureCache
from diffusion_backbones.selection.measure import candidates, measure
from diffusion_backbones.selection.prefix_cost import prefix_costs
from diffusion_backbones.selection.properties import Moments, Redundancy, cosine_basis

SIZE, SIDE = 256, 32


def moments(make, images=40, draws=2, channels=6):
    torch.manual_seed(0)
    found = Moments(SIZE)
    for _ in range(images):
        found.add(make(draws, channels))
    return found.properties()


def smooth(*shape, cycles=2):
    """Random maps with no more than so many cycles per image."""
    basis = cosine_basis(SIDE)
    coefficients = torch.zeros(*shape, SIDE, SIDE)
    coefficients[..., : 2 * cycles, : 2 * cycles] = torch.randn(*shape, 2 * cycles, 2 * cycles)
    return basis.T @ coefficients @ basis


# What is known by construction comes out.


def test_the_cosine_transform_keeps_energy():
    x = torch.randn(3, SIDE, SIDE)
    torch.testing.assert_close((cosine_basis(SIDE) @ x @ cosine_basis(SIDE).T).square().sum(), x.square().sum())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_noise_is_the_share_of_noise(share):
    def make(draws, channels):
        return (1 - share) ** 0.5 * torch.randn(1, channels, SIDE, SIDE) + share**0.5 * torch.randn(
            draws, channels, SIDE, SIDE
        )

    found = moments(make)
    assert found.noise == pytest.approx(share, abs=0.02)
    assert found.noise_low == pytest.approx(share, abs=0.04)
    assert found.position == pytest.approx(0, abs=0.03)


def test_noise_is_found_in_its_band():
    def make(draws, channels):
        noise = torch.randn(draws, channels, SIDE, SIDE)
        return 5 * smooth(1, channels) + noise - torch.nn.functional.avg_pool2d(noise, 9, 1, 4, count_include_pad=False)

    found = moments(make)
    assert found.noise_low < 0.1
    assert found.noise_bands[-1] == pytest.approx(1, abs=0.02)


def test_the_share_of_the_place_and_reading_it_off():
    torch.manual_seed(1)
    fixed, ramp = torch.randn(1, 6, SIDE, SIDE), torch.linspace(-1, 1, SIDE)
    patterned = moments(lambda draws, channels: fixed + torch.randn(1, channels, SIDE, SIDE).expand(draws, -1, -1, -1))
    assert patterned.position == pytest.approx(0.5, abs=0.03)

    def located(draws, channels):
        x = 0.3 * smooth(1, channels)
        x[:, 0] += 3 * ramp
        x[:, 1] += 3 * ramp[:, None]
        return x.expand(draws, -1, -1, -1)

    assert moments(located).xy > 0.9
    assert moments(lambda draws, channels: smooth(1, channels).expand(draws, -1, -1, -1)).xy < 0.2


def test_granularity_is_half_a_wavelength_in_pixels():
    def wave(k):
        def make(draws, channels):
            coefficients = torch.zeros(1, channels, SIDE, SIDE)
            coefficients[..., 0, k] = torch.randn(1, channels)
            return (cosine_basis(SIDE).T @ coefficients @ cosine_basis(SIDE)).expand(draws, -1, -1, -1)

        return moments(make).granularity

    assert wave(2) == pytest.approx(SIZE / 2, rel=1e-3)  # row 2 of the transform has one cycle
    assert wave(8) == pytest.approx(SIZE / 8, rel=1e-3)


def test_locality_and_massive_channels():
    near = moments(lambda draws, _: smooth(1, 32).expand(draws, -1, -1, -1))
    far = moments(lambda draws, _: torch.randn(1, 32, SIDE, SIDE).expand(draws, -1, -1, -1))
    assert near.locality > 0.3 > far.locality
    assert near.similarity[0][1] > near.similarity[8][1]
    assert near.similarity[0][0] == 16  # pixels between neighbours of the grid of 16 x 16

    def huge(draws, channels):
        x = torch.randn(1, channels, SIDE, SIDE)
        x[:, 2] *= 500
        return x.expand(draws, -1, -1, -1)

    assert moments(huge).massive == pytest.approx(500, rel=0.05)
    assert moments(huge).noise == pytest.approx(0, abs=1e-3)


def test_similarity_of_activations():
    torch.manual_seed(0)
    found, turn = Redundancy(), torch.linalg.qr(torch.randn(8, 8)).Q
    for _ in range(6):
        a, c = torch.randn(256, 8), torch.randn(256, 8)
        found.add([a, 3 * a @ turn, c, a + c])
    matrix = found.matrix()
    assert matrix[0, 1] == pytest.approx(1, abs=1e-4)
    assert matrix[0, 2] == pytest.approx(0, abs=0.05)
    assert 0.3 < matrix[0, 3] < 0.8


def test_too_little_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least 2 an image; got 1"):
        Moments(SIZE).add(torch.randn(1, 3, 8, 8))
    few = Moments(SIZE)
    few.add(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 4 images; got 1"):
        few.properties()


# The network.


@pytest.fixture(scope="module")
def whole():
    return db.create_model("tinysd", pretrained=True, recipe=["unet-out"])


@pytest.fixture(scope="module")
def images():
    return data.scenes(128).images


def test_visiting_gives_what_forward_gives_and_keeps_nothing(whole, images):
    ids = [site.id for site in candidates(whole.catalogue[name] for name in whole.catalogue)]
    seen = {}
    whole.visit_activations(images[0][None], ids, lambda site, act: seen.__setitem__(site.id, act))
    expected = whole.forward_activations(images[0][None], ids, as_maps=True)
    assert list(seen) == ids
    assert all(torch.equal(seen[name], expected[name]) for name in ids)
    alive: list[int] = []

    def count(*_):
        alive.append(sum(store.__len__() for store in [whole.recorder._store.acts]))

    whole.visit_activations(images[0][None], ids, count)
    assert max(alive) <= 4  # what has just come, and what another id also needs
    with pytest.raises(
        ValueError, match="mid-vit-block0-self-map cannot be visited; read such activations with forward_activations"
    ):
        whole.visit_activations(images[0][None], ["mid-vit-block0-self-map"], count)


def test_prefix_costs_agree_with_those_of_a_backbone_that_is_cut_there():
    backbone = db.create_model("sd15", recipe=["unet-out"], device="meta")
    found = prefix_costs(backbone, ["up-level3-repeat0-vit-block0-self-k", "unet-out"], 512)
    published = costs.published()["sd15_gdf"]
    assert found["up-level3-repeat0-vit-block0-self-k"].gflops == pytest.approx(
        published["denoiser_gflops"], rel=2e-3
    )  # a cut layer skips its queries
    assert found["up-level3-repeat0-vit-block0-self-k"].parameters == pytest.approx(published["parameters"], rel=1e-3)
    assert found["unet-out"].parameters == published["parameters_total"]
    with pytest.raises(ValueError, match="device='meta'"):
        prefix_costs(db.create_model("tinysd_gdf"), [], 512)


def test_noise_grows_towards_the_output_of_a_trained_network(whole, images):
    """Section 4.1 of the paper, on the weights in the package."""
    ids = ["up-level1-repeat1-res-out", "up-level3-repeat0-res-out", "up-level3-repeat2-vit-out", "unet-out"]
    found = measure(whole, images[:8], ids)
    noise = [found.properties[name].noise for name in ids]
    assert noise == sorted(noise)
    assert noise[-1] > 0.5 > 0.2 > noise[0]
    assert found.redundancy.diagonal().tolist() == pytest.approx([1] * 4)
    again = measure(whole, images[:8], ids[:1])
    assert again.properties[ids[0]] == found.properties[ids[0]]


# Rules.


def test_the_papers_rules(tmp_path):
    assert [rule.name for rule in rules.load()] == [
        "increment",
        "noise",
        "down stage",
        "locality",
        "position",
        "massive",
    ]
    like = moments(lambda draws, channels: smooth(1, channels).expand(draws, -1, -1, -1))
    ids = [
        "up-level1-repeat0-vit-block0-ffn-inner",
        "down-level1-repeat0-res-out",
        "up-level1-repeat0-vit-block0-self-q",
        "up-level1-repeat0-res-out",
    ]
    reasons = rules.apply(rules.load(), dict.fromkeys(ids, like))
    assert [reason.partition(":")[0] for reason in reasons.values()] == ["increment", "down stage", "locality", ""]
    assert "noise is 0, the threshold 0.2" in reasons[ids[2]].replace("noise is 0.000", "noise is 0")

    own = tmp_path / "rules.yaml"
    own.write_text("- {name: mine, ids: ['up-*'], because: I say so, above: {granularity: 1}}")
    assert rules.apply(rules.load(own), dict.fromkeys(ids, like))[ids[3]].startswith("mine: granularity is ")
    own.write_text("- {name: all, ids: ['*'], because: I say so}")
    with pytest.raises(ValueError, match=r"drop all 4 activations \(all\); raise a threshold"):
        rules.check_some_kept(rules.by_name(rules.load(own), ids))  # known before anything is measured
    own.write_text("- {name: all, ids: ['*'], because: I say so, below: {massive: 1000}}")
    rules.check_some_kept(rules.by_name(rules.load(own), ids))
    with pytest.raises(ValueError, match=r"drop all 4 activations \(all\); raise a threshold"):
        rules.check_some_kept(rules.apply(rules.load(own), dict.fromkeys(ids, like)))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- {name: a, ids: ['*'], because: b, above: {nois: 1}}", r"unknown property 'nois'. Did you mean noise"),
        (
            "- {name: a, ids: ['*'], because: b, abov: {noise: 1}}",
            r"rule 'a' has no setting 'abov'. Did you mean above",
        ),
        ("name: a", "must hold a list of rules"),
        ("- [", "is not a YAML or JSON file"),
    ],
)
def test_rules_that_cannot_be(tmp_path, text, error):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=error):
        rules.load(tmp_path / "r.yaml")


# Tasks.


def blobs(n=12, size=64):
    """Images with a class in every quarter, and a map that gives it away in its first channels."""
    rng = np.random.default_rng(0)
    masks = [np.kron(rng.integers(0, 3, (2, 2)), np.ones((size // 2, size // 2))).astype(np.uint8) for _ in range(n)]
    maps = [torch.nn.functional.one_hot(torch.from_numpy(mask).long(), 3).permute(2, 0, 1).float() for mask in masks]
    return [torch.zeros(3, size, size) for _ in range(n)], masks, maps


def test_a_probe_reads_what_is_there_and_nothing_else():
    images, masks, maps = blobs()
    task = tasks.Segmentation(images, masks)
    told = np.stack([task.reduce(i, act[None]) for i, act in enumerate(maps)])
    noise = np.stack([task.reduce(i, torch.randn(1, 3, 16, 16)) for i in range(len(maps))])
    assert told.shape == (12, tasks.POINTS, 3)
    assert task.score([told]).min() > 99
    assert task.score([noise]).max() < 40
    assert task.score([noise, told]).min() > 99
    masks[0][:] = 255  # an image without labels counts for nothing
    assert tasks.Segmentation(images, masks).score([told]).min() > 99


def test_points_are_found_in_known_warps():
    torch.manual_seed(0)
    images = [
        torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, (128, 128), mode="bicubic")[0].clamp(-1, 1)
        for _ in range(6)
    ]
    matches = tasks.warped(images)
    for match in matches:  # the image at a point is the copy at its match, but for the colour
        at = torch.from_numpy(match.source_points), torch.from_numpy(match.target_points)
        pairs = zip((match.source, match.target), at, strict=True)
        a, b = (
            torch.nn.functional.grid_sample(x[None], (p / 64 - 1)[None, None], align_corners=False)[0, :, 0]
            for x, p in pairs
        )
        assert min(torch.corrcoef(torch.stack([a[c], b[c]]))[0, 1] for c in range(3)) > 0.9
    task = tasks.Keypoints(matches)
    colours = np.stack([task.reduce(i, torch.nn.functional.avg_pool2d(view, 4)) for i, view in enumerate(task.views)])
    noise = np.stack([task.reduce(i, torch.randn(2, 8, 32, 32)) for i in range(len(task.views))])
    assert task.score([colours]).mean() > 3 * task.score([noise]).mean()


def test_data_that_cannot_be_compared_is_refused():
    images, masks, _ = blobs()
    with pytest.raises(ValueError, match="at least 4, got 3"):
        tasks.Segmentation(images[:3], masks[:3])
    with pytest.raises(ValueError, match="12 images and 11 masks"):
        tasks.Segmentation(images, masks[1:])
    with pytest.raises(ValueError, match=r"the masks hold 1: \[0\]"):
        tasks.Segmentation(images, [np.zeros_like(mask) for mask in masks])
    with pytest.raises(ValueError, match="mask 0 is"):
        tasks.Segmentation(images, [mask[1:] for mask in masks])
    with pytest.raises(ValueError, match="at least 3 pairs"):
        tasks.Keypoints(tasks.warped(images[:2]))


def folder_of(tmp_path, n=6, size=(96, 80)):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / "photos" / f"{i}.jpg")
        Image.fromarray(
            np.kron(rng.integers(0, 3, (2, 2)), np.ones((size[1] // 2, size[0] // 2))).astype(np.uint8)
        ).save(tmp_path / "masks" / f"{i}.png")
    return tmp_path / "photos", tmp_path / "masks"


def test_a_folder_of_photographs(tmp_path):
    photos, masks = folder_of(tmp_path)
    assert isinstance(data.folder(photos, 64).task, tasks.Keypoints)
    known = data.folder(photos, 64, masks)
    assert known.images[0].shape == (3, 64, 64)
    assert known.task.metric == "mIoU"
    pairs = tmp_path / "pairs.json"
    pairs.write_text(
        json.dumps(
            [
                {
                    "source": "0.jpg",
                    "target": "1.jpg",
                    "source_points": [[48, 40], [1, 1]],
                    "target_points": [[40, 40], [50, 40]],
                }
            ]
            * 3
        )
    )
    [match, *_] = data.folder(photos, 64, pairs=pairs).task.matches
    assert match.source_points.tolist() == [[32, 32]]  # the centre stays the centre; what is cut off has no match
    assert match.extent == pytest.approx(96 * 64 / 80)
    assert len(data.folder(photos, 64, pairs=pairs).images) == 2  # those that pairs name, each once
    (masks / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png is missing: every image needs a mask"):
        data.folder(photos, 64, masks)
    pairs.write_text("[{}]")
    with pytest.raises(ValueError, match="a list of objects with source, target"):
        data.folder(photos, 64, pairs=pairs)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target_points": [[40, 40]]}, "pairs.json, pair 1 has 2 source and 1 target points"),
        (
            {"source_points": "here"},
            "pairs.json, pair 1: source_points must be numbers, 2 for each: rows of [x, y], got 'here'",
        ),
        ({"source_points": [[1, 2, 3]]}, "pairs.json, pair 1: source_points must be numbers, 2 for each"),
        ({"target_box": [1, 2]}, "pairs.json, pair 1: target_box must be numbers, 4 for each"),
        ({"target": "nowhere.jpg"}, "nowhere.jpg, which a pair names, is missing"),
    ],
)
def test_pairs_that_are_none(tmp_path, change, error):
    photos, _ = folder_of(tmp_path, 2)
    pair = {
        "source": "0.jpg",
        "target": "1.jpg",
        "source_points": [[48, 40], [1, 1]],
        "target_points": [[40, 40], [50, 40]],
    }
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair | change, pair]))
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        data.folder(photos, 64, pairs=tmp_path / "pairs.json")
    assert error in str(told.value)


# The choice.


def test_the_choice_is_greedy_within_its_budget(whole):
    sites = [
        whole.catalogue[name]
        for name in ("up-level1-repeat0-res-out", "up-level2-repeat0-res-out", "up-level3-repeat0-res-out")
    ]
    worth = dict(zip([s.id for s in sites], (3.0, 2.0, 1.0), strict=True))

    def score(ids):
        return np.array([sum(worth[name] for name in ids)] * 3)

    alone = {site.id: score([site.id]) for site in sites}
    assert [step.gain for step in choose.choose(sites, alone, score)] == [3, 2, 1]
    assert len(choose.choose(sites, alone, score, Budget(max_activations=2))) == 2
    narrow = choose.choose(sites, alone, score, Budget(channels=sites[0].channels + sites[2].channels))
    assert [step.id for step in narrow] == [sites[0].id, sites[2].id]
    early = choose.choose(sites, alone, score, Budget(gflops=2, costs={site.id: float(site.id[8]) for site in sites}))
    assert [step.id for step in early] == [sites[0].id, sites[1].id]
    worth[sites[1].id] = worth[sites[2].id] = 0
    assert len(choose.choose(sites, alone, score, Budget(max_activations=2))) == 1
    with pytest.raises(ValueError, match="no activation fits the budget; of 3 the narrowest has 48 channels"):
        choose.choose(sites, alone, score, Budget(channels=3))


def test_what_is_too_wide_keeps_nothing_from_its_turn(whole):
    """The best four of a stride are tried of those that fit, and not of all."""
    sites = [
        site
        for site in (whole.catalogue[name] for name in whole.catalogue)
        if site.layout == "tokens" and site.stride == 16
    ]
    narrow = min(site.channels for site in sites)
    alone = {site.id: np.full(3, float(site.channels)) for site in sites}
    assert sum(site.channels > narrow for site in sites) > choose.PER_STRIDE
    [step] = choose.choose(sites, alone, lambda ids: alone[ids[0]], Budget(channels=narrow))
    assert step.score == narrow


def test_from_the_command_to_a_recipe(tmp_path):
    out = tmp_path / "selection"
    photos, masks = folder_of(tmp_path)
    places = ["--images", str(photos), "--masks", str(masks)]
    command = [
        "select",
        "tinysd",
        "-o",
        str(out),
        "--size",
        "64",
        "--max-channels",
        "300",
        "--members",
        "2",
        "--device",
        "cpu",
    ]
    first = CliRunner().invoke(main, [*command, *places])
    assert first.exit_code == 0, first.output
    rows = list(csv.DictReader((out / "activations.csv").open()))
    assert len(rows) == 165
    assert all(bool(row["dropped"]) != bool(row["mIoU"]) for row in rows)
    chosen = sorted((row for row in rows if row["chosen"]), key=lambda row: int(row["chosen"]))
    assert 1 <= len(chosen) <= 2
    assert float(chosen[0]["mIoU"]) == max(float(row["mIoU"]) for row in rows if row["mIoU"])
    backbone = db.create_model("tinysd", pretrained=True, recipe=out / "recipe.yaml")
    assert sorted(name for level in backbone.declaration.recipe.levels for name in level.activations) == sorted(
        row["id"] for row in chosen
    )
    assert sum(backbone.feature_info.channels()) <= 300
    assert backbone(torch.zeros(1, 3, 64, 64))

    before = (out / "activations.csv").read_text()
    state = json.loads((out / "evidence" / "done.json").read_text())
    (out / "evidence" / "done.json").write_text(
        json.dumps(state | {"looked": dict.fromkeys(state["looked"], 3)})
    )  # as if it had been killed
    assert CliRunner().invoke(main, [*command, *places]).exit_code == 0
    assert (out / "activations.csv").read_text() == before
    told = (out / "measured.json").stat().st_mtime_ns
    other = CliRunner().invoke(main, [*command, *places[:2]])
    assert other.exit_code == 1
    assert "holds features with another data" in other.output
    assert (out / "measured.json").stat().st_mtime_ns == told  # and nothing of the first was lost, nor measured in vain


def test_only_missing_views_are_computed(whole, tmp_path):
    task, computed = tasks.Keypoints(tasks.warped(data.scenes(64).images[:4])), []
    FeatureCache(tmp_path, {}).gather(
        whole, task, ["mid-vit-out"], lambda items: computed.append(list(items)) or computed[-1]
    )
    cache = FeatureCache(tmp_path, {})
    before = cache["mid-vit-out"].copy()
    cache.gather(whole, task, ["mid-vit-out"], lambda items: computed.append(list(items)) or computed[-1])
    cache.gather(whole, task, ["mid-vit-out", "unet-out"], lambda items: computed.append(list(items)) or computed[-1])
    assert [len(some) for some in computed] == [4, 0, 4]
    assert np.array_equal(cache["mid-vit-out"], before)
    assert len(cache["unet-out"]) == 4


class Growing(tasks.Keypoints):
    """Features that grow from view to view, as those of large networks do beyond float16's 65504."""

    def reduce(self, index, act):
        return np.full((2, 3), 1.5 * 1000**index, np.float32)


def test_features_that_float16_cannot_hold_are_kept_whole(whole, tmp_path):
    task, cache = Growing(tasks.warped(data.scenes(64).images[:4])), FeatureCache(tmp_path, {})
    cache.gather(whole, task, ["mid-vit-out"])
    assert cache["mid-vit-out"].tolist() == [[[1.5 * 1000**i] * 3] * 2 for i in range(4)]
    assert {path.name for path in tmp_path.iterdir()} == {"mid-vit-out.npy", "done.json"}


def test_features_of_something_else_are_not_mixed(tmp_path):
    FeatureCache(tmp_path, {"size": 64})._mark(["mid-vit-out"], 3)
    assert FeatureCache(tmp_path, {"size": 64}).looked == {"mid-vit-out": 3}
    with pytest.raises(ValueError, match="features with another size"):
        FeatureCache(tmp_path, {"size": 128})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tinysdd"], "'tinysdd' is neither a checkpoint nor a folder. Did you mean tinysd?"),
        (["tinysd", "--size", "100"], "tinysd needs a multiple of 64, such as 64, got 100"),
        (["tinysd", "--masks", "."], "--masks and --keypoints need --images"),
        ([".", "--random-weights"], "goes neither with a folder nor with --checkpoint-path"),
        (
            ["tinysd", "--random-weights", "--checkpoint-path", "."],
            "goes neither with a folder nor with --checkpoint-path",
        ),
        (["tinysd", "--images", ".", "--task", "masks"], "--task chooses among the package's own scenes"),
    ],
)
def test_wrong_usage_is_told_before_the_work(tmp_path, arguments, error):
    result = CliRunner().invoke(main, ["select", *arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert error in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("n", "arguments", "error"),
    [
        (3, [], "properties are measured on at least 4 images, better on a few dozen; got 3"),
        (3, ["--masks", "masks"], "give at least 4, got 3"),
        (6, ["--max-channels", "3"], "no activation fits the budget; of 67 the narrowest has 320 channels"),
        (6, ["--max-gflops", "0.00001"], "no activation fits the budget; of 67"),
        (6, ["--ids", "*-self-v"], "the rules drop all 16 activations (increment)"),
    ],
)
def test_what_cannot_end_well_does_not_begin(tmp_path, monkeypatch, n, arguments, error):
    """Neither is anything written nor are weights read, which may have to be downloaded."""
    folder_of(tmp_path, n)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        main, ["select", "sd15", "--images", "photos", "--size", "64", "-o", "out", "--device", "cpu", *arguments]
    )
    assert result.exit_code == 1
    assert error in result.output
    assert not (tmp_path / "out").exists()


def test_a_selection_is_what_it_writes(tmp_path):
    known = data.scenes(64)
    few = data.Data(known.images[:8], tasks.Keypoints(tasks.warped(known.images[:4])), "eight scenes")
    said: list[str] = []
    chosen = run.select("tinysd", few, tmp_path, members=1, device="cpu", say=said.append)
    assert chosen.metric == "PCK@0.1"
    assert db.Recipe.from_file(tmp_path / "recipe.yaml").ids == chosen.recipe.ids == (chosen.steps[0].id,)
    kept = sum(path.stat().st_size for path in (tmp_path / "evidence").glob("*.npy"))
    at_most = float(re.search(r"at most (\S+) GB on the disk", said[0]).group(1)) * 1e9
    assert 0.5 * at_most < kept < 1.05 * at_most  # told before it began, by rules that nothing was measured for
    assert re.search(
        r"8 images x 2 noise draws and 4 views: \S+ TFLOPs in the denoiser, \S+ in the image encoder", said[0]
    )
    curves = list(csv.DictReader((tmp_path / "curves.csv").open()))
    mine = [row for row in curves if row["id"] == chosen.steps[0].id]
    properties = chosen.measured.properties[chosen.steps[0].id]
    assert [float(row["value"]) for row in mine if row["curve"].startswith("similarity")] == pytest.approx(
        [v for _, v in properties.similarity], abs=1e-3
    )
    octaves = [float(row["at"]) for row in mine if row["curve"].startswith("noise")]
    assert octaves == [octave for octave, share in enumerate(properties.noise_bands) if share is not None]
    assert octaves[:2] == [0, 1]

    run.select("tinysd", few, tmp_path, members=1, device="cpu", everything=True, say=said.append)
    assert re.search(r"of the best 10 of all 165 the filter keeps \d", said[-2])
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "evidence").iterdir()}
    free = run.select("tinysd", few, tmp_path, rules=[], members=1, device="cpu")
    assert free.steps[0].score == max(float(score.mean()) for score in free.scores.values()) >= chosen.steps[0].score
    assert before == {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "evidence").iterdir()
    }  # nothing was computed again


def test_candidates_are_compared_as_the_recipe_gives_them(tmp_path):
    known = data.scenes(64)
    few = data.Data(known.images[:4], tasks.Keypoints(tasks.warped(known.images[:3])), "four scenes")
    settings = {"ids": ("up-level1-*-res-out", "mid-vit-out"), "rules": [], "members": 1, "device": "cpu"}
    chosen = run.select("tinysd", few, tmp_path, discard="auto", normalize="l2", **settings)
    written = db.Recipe.from_file(tmp_path / "recipe.yaml")
    assert (written.normalize, written.discard) == ("l2", chosen.recipe.discard)
    assert [name for name, _ in written.discard] == list(written.ids)
    for name in chosen.scores:
        own = db.Recipe("own", [name], discard="auto", normalize="l2", input_size=64)
        backbone = db.create_model("tinysd", recipe=own, pretrained=True)
        if name in written.ids:
            assert backbone.declaration.recipe.discard == written.discard
        expected = np.stack([few.task.reduce(i, backbone(view)[0]) for i, view in enumerate(few.task.views)])
        np.testing.assert_allclose(np.load(tmp_path / "evidence" / f"{name}.npy"), expected, atol=2e-3)
    with pytest.raises(ValueError, match="holds features with another normalize"):
        run.select("tinysd", few, tmp_path, discard="auto", normalize="layer", **settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"discard": "3"}, "discard='auto' or without, got '3'"), ({"normalize": "adaptive"}, "'layer', 'l2' or 'none'")],
)
def test_candidates_are_treated_in_no_other_way(settings, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        run.select("tinysd", data.scenes(64), tmp_path / "out", **settings)
