"""The yardstick of scripts/tinysd: every task and interval against a computation that shares no code with it."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.io import savemat
from scipy.spatial.distance import cdist

from diffusion_backbones.evaluation.scenes import Scene, load_scenes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "tinysd"))

import drawn_tasks  # noqa: E402
import evaluate  # noqa: E402
import evaluation_set  # noqa: E402
import intervals  # noqa: E402
import linear_probe  # noqa: E402
import photo_features  # noqa: E402
import photo_tasks  # noqa: E402
import propagation  # noqa: E402
import recognized  # noqa: E402
import sample  # noqa: E402
import sprites  # noqa: E402
import table  # noqa: E402

COLOR, POSITION = (photo_features.features(name, 0) for name in ("color", "position"))


# Intervals.


def test_the_interval_of_a_share_is_that_of_the_normal_distribution():
    right = np.arange(400) < 100
    outcome = intervals.Outcome(np.stack([right, np.ones(400)], 1).astype(int), intervals.share)
    value, low, high = intervals.figure([outcome])
    assert value == 25
    deviation = 100 * (0.25 * 0.75 / 400) ** 0.5
    assert low == pytest.approx(25 - 1.96 * deviation, abs=0.6)
    assert high == pytest.approx(25 + 1.96 * deviation, abs=0.6)


def test_several_networks_give_their_mean_and_every_draw_takes_the_same_units_of_them():
    """Of two networks, one of which is right where the other is wrong, the mean is always a half."""
    right = np.arange(60) % 3 == 0
    outcomes = [
        intervals.Outcome(np.stack([some, np.ones(60)], 1).astype(int), intervals.share) for some in (right, ~right)
    ]
    assert intervals.figure(outcomes) == (50, 50, 50)


def test_an_interval_needs_two_units():
    with pytest.raises(SystemExit, match=r"at least 2 images, pairs or sequences, got 1"):
        intervals.figure([intervals.Outcome(np.ones((1, 2)), intervals.share)])


def test_confusion_tables_give_the_mean_iou():
    tables = np.zeros((2, 2, 3, 3), int)  # two images, two probes
    tables[0, 0, 0, 0], tables[0, 0, 0, 1], tables[1, 0, 1, 1], tables[1, 0, 2, 0] = 2, 1, 2, 1
    tables[:, 1, 0, 0] = 5  # the second probe makes no mistake
    assert intervals.mean_iou(tables) == pytest.approx((100 * np.mean([2 / 4, 2 / 3, 0]) + 100) / 2)
    truth, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    assert photo_tasks.confusion(truth, guess, 3).tolist() == tables[:, 0].sum(0).tolist()


# Features.


def test_features_of_photographs_have_their_places():
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    assert POSITION.dense(x).shape[2:] == (16, 24)
    torch.testing.assert_close(POSITION.dense(x)[1, :2, 3, 5], torch.tensor([2 * 14 / 64 - 1, 2 * 22 / 96 - 1]))
    torch.testing.assert_close(COLOR.dense(x)[1, :3, 3, 5], x[1, :, 12:16, 20:24].mean((1, 2)))
    patch = x[1, :, 14 - 8 : 14 + 9, 22 - 8 : 22 + 9].flatten()
    patch = patch - patch.mean()
    torch.testing.assert_close(COLOR.matching(x)[1, :, 3, 5], patch / patch.norm())
    with pytest.raises(SystemExit, match=r"resnet needs --resnet"):
        photo_features.features("resnet", 0)


def test_levels_are_resized_and_of_one_length_for_matching():
    maps = [torch.rand(1, 4, 8, 8), torch.rand(1, 16, 4, 4) * 100]
    network = photo_features.of_maps("two levels", lambda x: maps)
    x = torch.zeros(1, 3, 32, 32)
    assert torch.equal(network.dense(x)[:, :4], maps[0])
    matching = network.matching(x)
    torch.testing.assert_close(matching.norm(dim=1), torch.ones(1, 8, 8))
    torch.testing.assert_close(matching[:, :4].norm(dim=1), torch.full((1, 8, 8), 0.5**0.5))  # none outvotes another
    torch.testing.assert_close(network.pooled(x)[0], torch.cat([m.mean((2, 3)) for m in maps], 1)[0])


def test_the_most_similar_place_is_found():
    torch.manual_seed(0)
    target = F.normalize(torch.randn(32, 6, 9), dim=0)
    source = target.flip(1, 2)  # what is at (y, x) in one is at (5 - y, 8 - x) in the other
    places = torch.tensor([[(x + 0.5) / 9 * 2 - 1, (y + 0.5) / 6 * 2 - 1] for y in range(6) for x in range(9)])
    expected = torch.tensor([[(8 - x + 0.5) * 4, (5 - y + 0.5) * 4] for y in range(6) for x in range(9)])
    torch.testing.assert_close(photo_features.nearest(source, target, places), expected)
    a, b = (POSITION.matching(torch.zeros(1, 3, *size))[0] for size in ((64, 96), (32, 128)))
    found = photo_features.nearest(a, b, torch.tensor([[-0.5, 0.25], [0.9, -0.9]]))
    assert (found - torch.tensor([[32.0, 20.0], [121.6, 1.6]])).abs().max() <= 2.01  # the same relative place


# Probes.


def test_the_linear_probe_separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    y = (x[:, 0] > 0).long().numpy()
    probe = linear_probe.Probe(x[:500], y[:500], 2)
    probe.fit(1e-3)
    assert (probe(x[500:]) == y[500:]).mean() > 0.95


def test_the_linear_probe_is_ridge_regression():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 7)) * rng.uniform(1, 9, 7), rng.integers(0, 4, 300)
    probe = linear_probe.Probe(torch.from_numpy(x).float(), y, 4)
    probe.fit(0.1)
    scaled = StandardScaler().fit_transform(x)
    other = Ridge(alpha=0.1 * 300).fit(scaled, np.eye(4)[y])
    assert (probe(torch.from_numpy(x).float()) == other.predict(scaled).argmax(1)).mean() > 0.99


STRIPES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (11, 3)) / 127.5 - 1).float()
"""The colors of 11 classes."""


def _near_stripes(x):
    """How near the color of a place is to each of those: what a line can tell apart."""
    small = F.avg_pool2d(x, 4)
    return torch.exp(-4 * (small[:, None] - STRIPES[None, :, :, None, None]).square().sum(2))


def _striped(path: Path, labels: Path, seed: int) -> None:
    """A picture of 480 x 360 pixels in upright stripes, whose color is their class."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(11), 2))[:20].repeat(24)
    colors = ((STRIPES.numpy() + 1) * 127.5).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(colors[classes], (360, 480, 3)).astype(np.uint8)).save(path, quality=95)
    Image.fromarray(np.broadcast_to(classes, (360, 480)).astype(np.uint8)).save(labels)


def test_a_probe_of_colors_solves_what_colors_say_and_position_does_not(tmp_path):
    for split, seeds in (("train", range(3)), ("val", range(3, 5)), ("test", range(5, 8))):
        for seed in seeds:
            root = tmp_path / "camvid"
            _striped(root / split / f"{seed}.jpg", root / f"{split}annot" / f"{seed}.png", seed)
    near = photo_features.Features("near", _near_stripes, COLOR.matching, COLOR.pooled)
    by_color = photo_tasks.camvid(tmp_path, near)["CamVid mIoU"]
    assert by_color.units.shape == (3, 1, 11, 11)
    assert by_color.units.sum() == 3 * 64 * 48  # every place of every test photograph
    by_position = photo_tasks.camvid(tmp_path, POSITION)["CamVid mIoU"]
    assert by_color.score(by_color.units) > 80
    assert by_position.score(by_position.units) < 25
    with pytest.raises(SystemExit, match=r"holds no photographs"):
        photo_tasks.camvid(tmp_path / "none", COLOR)


@pytest.fixture
def photographs(tmp_path):
    """Pictures of three colors that are their classes, 60 of each, in one tar file and its index."""
    folder, rows = tmp_path / "photos192", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(180):
            base = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)][i % 3])
            file = io.BytesIO()
            noisy = (base + rng.normal(0, 25, (192, 192, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file, "webp", quality=80)
            info = tarfile.TarInfo(f"{i}.webp")
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
            name = ("apple", "leaf", "sky")[i % 3]
            rows.append(["a.tar", info.name, f"a photo of a {name}", name])
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["shard", "file", "caption", "class"], *rows, ["a.tar", "0.webp", "a photo", ""]])
    return tmp_path


def test_classes_of_photographs_that_training_never_saw(photographs):
    train, test = photo_tasks.rows(photographs / "photos192")
    assert len(train) + len(test) == 180  # what has no class is left out
    assert not {row["file"] for row in train} & {row["file"] for row in test}
    (metric, by_color) = next(iter(photo_tasks.classes(photographs, COLOR).items()))
    assert metric == "accuracy of 3 classes"
    assert len(by_color.units) == len(test)
    assert by_color.score(by_color.units) == 100
    by_position = photo_tasks.classes(photographs, POSITION)[metric]  # the same for all: one class is always named
    most = max(np.unique([row["class"] for row in test], return_counts=True)[1])
    assert by_position.score(by_position.units) <= 100 * most / len(test)
    assert photo_tasks.common([{"class": c} for c in "cabbacc"], 2) == ["c", "a"]
    assert photo_tasks.caption(test, "sky") == "a photo of a sky"


def test_a_classifier_knows_its_classes_and_is_asked_about_others_than_it_learned(photographs):
    train, _ = photo_tasks.rows(photographs / "photos192")
    some = train[:60]
    images = list(photo_tasks.pictures(photographs / "photos192", some))
    x = recognized.describe(COLOR, images)
    y = np.array([("apple", "leaf", "sky").index(row["class"]) for row in some])
    own = recognized.own_accuracy(x, x, y)
    assert own.score(own.units) == 100
    by_chance = recognized.own_accuracy(x, x, np.random.default_rng(0).permutation(y))
    assert by_chance.score(by_chance.units) < 60, "a classifier that learned by heart was asked what it had learned"
    large = [image.resize((256, 256)) for image in images[:6]]
    assert (recognized.learn(x, x, y).predict(recognized.describe(COLOR, large)) == y[:6]).all()


def test_a_sheet_has_its_pictures_in_rows():
    images = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]
    made = sample.sheet(images, [f"caption {i}" for i in range(6)], columns=4)
    assert made.size == (4 * sample.CELL, 2 * (sample.CELL + sample.MARGIN))
    for i in range(6):
        middle = (i % 4 * sample.CELL + 80, i // 4 * (sample.CELL + sample.MARGIN) + 80)
        assert made.getpixel(middle) == (40 * i, 0, 0)


# Matching.


def test_keypoints_that_are_where_they_were(tmp_path):
    """Position finds the points that did not move, to half a place, and no others."""
    folder = tmp_path / "pf-willow" / "PF-dataset-WILLOW" / "things"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    points = rng.uniform(40, 200, (10, 2))
    moved = points.copy()
    moved[6:] += np.where(points[6:] > 120, -60, 60)
    for name, (size, found) in {
        "a": ((256, 256), points),
        "b": ((256, 256), moved),
        "c": ((512, 512), points * 2),
    }.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{name}.png")
        savemat(folder / f"{name}.mat", {"pts_coord": found.T + 0.5})
    found = photo_tasks.willow(tmp_path, POSITION)
    assert list(found) == ["PF-WILLOW PCK@0.05", "PF-WILLOW PCK@0.1", "PF-WILLOW PCK@0.15"]
    assert found["PF-WILLOW PCK@0.1"].units.tolist() == [[6, 10], [10, 10], [6, 10], [6, 10], [10, 10], [6, 10]]


def test_keypoints_of_drawn_scenes():
    full = load_scenes()
    found = drawn_tasks.keypoints(_few(full, pairs=full.pairs[29:31]), POSITION)
    for pair in full.pairs[29:31]:
        x0, y0, x1, y1 = pair.target_box
        there = np.floor(pair.source_points / 4) * 4 + 2  # the places are four pixels wide
        near = (np.linalg.norm(there - pair.target_points, axis=1) <= 0.1 * max(x1 - x0, y1 - y0)).sum()
        assert found[f"PCK@0.1, {pair.split}"].units.tolist() == [[near, len(pair.source_points)]]


def _few(full, **splits):
    from dataclasses import replace

    return replace(full, **splits)


# Drawn scenes.


@pytest.fixture(scope="module")
def drawn():
    """Sprites of two classes and two styles: discs and squares with a bright corner."""
    y, x = np.mgrid[: sprites.SIDE, : sprites.SIDE]
    disc = (np.hypot(x - 63.5, y - 63.5) < 60)[..., None] * np.array([255, 40, 40, 255])
    square = np.ones((sprites.SIDE, sprites.SIDE, 1)) * np.array([40, 40, 255, 255])
    identities = [sprites.Identity("red disc", "fruit", False), sprites.Identity("blue square", "building", False)]
    images = np.stack([disc, square, disc, square]).astype(np.uint8)
    return sprites.Sprites(images, np.array([0, 0, 4, 4]), np.array([0, 1, 0, 1]), identities)


def test_scenes_are_drawn_anew_and_always_the_same(drawn):
    assert drawn_tasks.SCENES >= 400
    first, again = drawn_tasks.draw(drawn, 3), drawn_tasks.draw(drawn, 3)
    assert [scene.caption for scene in first] == [scene.caption for scene in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert first[0].image.size == (evaluation_set.SIDE,) * 2
    assert drawn_tasks.STREAM not in {*range(len(evaluation_set.SPLITS)), *range(100, 100 + len(evaluation_set.PAIRS))}


@pytest.mark.parametrize("name", ["color", "tinysd_gdf", photo_features.SINGLE[0]])
def test_a_probe_of_drawn_scenes(name, drawn, monkeypatch):
    """Two objects of plain colors: a probe of colors finds them, and every place of every scene is counted."""
    monkeypatch.setattr(drawn_tasks, "PROBES", 2)
    some = drawn_tasks.draw(drawn, 6)
    test = drawn_tasks.draw(drawn, 8)[6:]
    data = _few(load_scenes(), scenes=tuple(test), identities=tuple(test), style=tuple(test))
    found = drawn_tasks.probe(some, data, photo_features.features(name, 0))
    assert list(found) == ["mIoU, scenes", "mIoU, identities", "mIoU, style"]
    outcome = found["mIoU, scenes"]
    assert outcome.units.shape == (2, 2, 16, 16)
    assert (outcome.units.sum((2, 3)) == 64 * 64).all()
    for scene, tables in zip(test, outcome.units, strict=True):
        counts = np.bincount(np.asarray(scene.classes)[2::4, 2::4].ravel(), minlength=16)
        assert (tables.sum(2) == counts).all()
    assert isinstance(test[0], Scene)
    if name == "color":
        assert outcome.score(outcome.units) > 50


# Propagation.


def test_masks_are_propagated_as_a_loop_would():
    torch.manual_seed(0)
    frames = [F.normalize(torch.randn(6, 10, 8), dim=0) for _ in range(10)]
    first = torch.rand(10, 8)
    masks = [first.numpy()]
    for t in range(1, len(frames)):
        mask = np.zeros((10, 8))
        known = [0, *range(max(1, t - 7), t)]
        for y in range(10):
            for x in range(8):
                candidates = []
                for k in known:
                    for v in range(max(0, y - 2), min(10, y + 3)):  # 12 of 60 rows are 2 of 10
                        for u in range(max(0, x - 2), min(8, x + 3)):
                            similar = float(frames[t][:, y, x] @ frames[k][:, v, u])
                            candidates.append((similar, masks[k][v, u]))
                best = sorted(candidates, reverse=True)[:5]
                weights = np.exp(np.array([similar for similar, _ in best]) / 0.1)
                mask[y, x] = (weights * [value for _, value in best]).sum() / weights.sum()
        masks.append(mask)
    found = torch.stack(list(propagation.propagate(frames, first)))
    np.testing.assert_allclose(found.numpy(), np.stack(masks[1:]), atol=1e-4)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, 9), (6, 6), (40, 40)])
def test_outlines_agree_as_their_distances_say(shift):
    a, b = np.zeros((2, 120, 160), bool)
    a[30:60, 40:90] = True
    a[10:20, 120:150] = True
    b[30 + shift[0] : 60 + shift[0], 40 + shift[1] : 90 + shift[1]] = True

    def outline(mask):
        found = []
        for y in range(120):
            for x in range(160):
                others = [mask[min(y + v, 119), min(x + u, 159)] for v, u in ((0, 1), (1, 0), (1, 1))]
                if any(other != mask[y, x] for other in others):
                    found.append((y, x))
        return np.array(found)

    distance = cdist(outline(a), outline(b))
    limit = np.ceil(0.008 * 200)  # 120 x 160 has a diagonal of 200
    precision, recall = (distance.min(0) <= limit).mean(), (distance.min(1) <= limit).mean()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert propagation.outlines_agree(a, b) == pytest.approx(expected)
    inside = (a & b).sum()
    assert propagation.overlap(a, b) == pytest.approx(inside / (1500 + 300 + 1500 - inside))


def test_empty_masks():
    empty, full = np.zeros((9, 9), bool), np.pad(np.ones((3, 3), bool), 3)
    assert propagation.overlap(empty, empty) == propagation.outlines_agree(empty, empty) == 1
    assert propagation.overlap(empty, full) == propagation.outlines_agree(empty, full) == 0


def test_a_mask_follows_its_object_where_features_do(tmp_path):
    """A red square wanders over noise: its color carries the mask along, and position leaves it behind."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 90, (36, 64, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for name in ("one", "two"):
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / "davis16" / kind / "144p" / name).mkdir(parents=True)
        for t in range(8):
            image, mask = Image.fromarray(noise), Image.new("L", (256, 144))
            box = (40 + 12 * t, 50, 40 + 12 * t + 48, 98)
            ImageDraw.Draw(image).rectangle(box, fill=(230, 40, 40))
            ImageDraw.Draw(mask).rectangle(box, fill=255)
            image.save(tmp_path / "davis16/JPEGImages/144p" / name / f"{t:05}.jpg", quality=95)
            mask.save(tmp_path / "davis16/Annotations/144p" / name / f"{t:05}.png")
    raw = photo_features.Features("raw", COLOR.dense, lambda x: F.normalize(COLOR.dense(x)[:, :3], dim=1), COLOR.pooled)
    found = {f.name: propagation.davis(tmp_path, f) for f in (raw, POSITION)}
    assert found["raw"]["DAVIS J"].units.shape == (2,)
    assert found["raw"]["DAVIS J"].units.min() > 80
    staying = [max(0, 49 - 12 * t) / (49 + 12 * t) for t in range(1, 7)]  # what the first mask overlaps with each
    assert found["position"]["DAVIS J"].units == pytest.approx(100 * np.mean(staying), abs=6)
    parts = found["raw"]
    np.testing.assert_allclose(parts["DAVIS J&F"].units, (parts["DAVIS J"].units + parts["DAVIS F"].units) / 2)


# The command.


def test_figures_come_into_the_table_and_into_the_document(tmp_path, monkeypatch):
    rows = [
        {"features": name, "metric": metric, "value": "1.5", "low": "1.0", "high": "2.0", "units": "9"}
        for name in ("rgb", "gdf")
        for metric in ("mIoU", "PCK")
    ]
    made = table.table(rows[:3])
    assert made.splitlines() == [
        "| features | mIoU | PCK |",
        "| --- | --- | --- |",
        "| `rgb` | 1.5 [1.0, 2.0] | 1.5 [1.0, 2.0] |",
        "| `gdf` | 1.5 [1.0, 2.0] |  |",
    ]
    wide = table.table([{**rows[0], "metric": f"m{i}"} for i in range(7)])
    assert [line for line in wide.splitlines() if "features" in line] == [
        "| features | m0 | m1 | m2 | m3 | m4 |",
        "| features | m5 | m6 |",
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:3])
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "t.csv"), str(document)])
    table.main()
    assert document.read_text() == f"before\n<!-- figures -->\n{made}<!-- /figures -->\nafter\n"
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="0 times"):
        table.main()


def test_the_yardstick_measures_an_untrained_network_three_times(monkeypatch):
    seen = []

    def features(name, seed, *_):
        seen.append((name, seed))
        return seed

    def task(seed):
        return {"right": intervals.Outcome(np.array([[seed, 2], [seed, 2]]), intervals.share)}

    monkeypatch.setattr(evaluate, "features", features)
    (row,) = evaluate.measure("untrained", {"task": task}, None, None)
    assert row == {
        "features": "untrained",
        "metric": "right",
        "value": "50.0",
        "low": "50.0",
        "high": "50.0",
        "units": "2",
    }
    assert seen == [("untrained", seed) for seed in (0, 1, 2)]
    evaluate.measure("tinysd_gdf", {"task": task}, None, None)
    assert seen[3:] == [("tinysd_gdf", 0)]
    with pytest.raises(SystemExit, match=r"camvid needs --photographs DATA"):
        evaluate.tasks(argparse.Namespace(only=["camvid"], photographs=None))
