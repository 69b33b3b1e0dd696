"""The evaluation scenes in the package, and the scripts that made them and trained tinysd."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffusion_backbones.evaluation.scenes import load_scenes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "tinysd"))

import evaluation_set  # noqa: E402
import scenes  # noqa: E402
import sprites  # noqa: E402
import vocabulary  # noqa: E402


@pytest.fixture(scope="module")
def drawn():
    """Sprites of two classes and two styles: discs and squares with a bright corner."""
    y, x = np.mgrid[: sprites.SIDE, : sprites.SIDE]
    disc = (np.hypot(x - 63.5, y - 63.5) < 60)[..., None] * np.array([255, 40, 40, 255])
    square = np.ones((sprites.SIDE, sprites.SIDE, 1)) * np.array([40, 40, 255, 255])
    square[:40, :40, :3] = 255
    identities = [sprites.Identity("red disc", "fruit", False), sprites.Identity("blue square", "building", True)]
    return sprites.Sprites(
        np.stack([disc, square, disc, square]).astype(np.uint8),
        np.array([0, 0, 4, 4]),
        np.array([0, 1, 0, 1]),
        identities,
    )


def test_the_evaluation_set_is_whole():
    everything = load_scenes()
    assert everything.classes == ("background", *sprites.CLASSES)
    assert {name: len(getattr(everything, name)) for name in evaluation_set.SPLITS} == {
        name: count for name, (count, _, _) in evaluation_set.SPLITS.items()
    }
    for split in evaluation_set.SPLITS:
        labels = np.stack([scene.classes for scene in getattr(everything, split)])
        assert set(np.unique(labels)) == set(range(16)), f"{split} lacks a class"
        for scene in getattr(everything, split):
            assert scene.image.size == (256, 256)
            assert scene.classes.shape == scene.instances.shape == (256, 256)
            assert ((scene.classes == 0) == (scene.instances == 0)).all()
            for instance in range(1, scene.instances.max() + 1):
                assert len(np.unique(scene.classes[scene.instances == instance])) == 1
            assert " on " in scene.caption
    for pair in everything.pairs:
        assert len(pair.source_points) == len(pair.target_points) >= evaluation_set.POINTS // 2
        x0, y0, x1, y1 = pair.target_box
        assert ((pair.target_points >= [x0, y0]) & (pair.target_points <= [x1, y1])).all()
    assert {pair.split for pair in everything.pairs} == {"identities", "style"}
    assert sum(path.stat().st_size for path in (ROOT / "diffusion_backbones/data").rglob("*")) < 6e6


def test_a_folder_that_holds_no_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no scenes.json.*leave folder= out"):
        load_scenes(tmp_path)


def test_a_seed_is_a_scene(drawn):
    choice = drawn.where(False, False)
    assert choice.tolist() == [0]
    assert [drawn.where(True, False).tolist(), drawn.where(False, True).tolist()] == [[1], [2]]
    first, again, other = (scenes.draw(np.random.default_rng(seed), drawn, [0, 1], 96) for seed in (5, 5, 6))
    assert (first.image == again.image).all()
    assert first.caption == again.caption
    assert (first.image != other.image).any()


def test_labels_captions_and_places_belong_together(drawn):
    for seed in range(20):
        scene = scenes.draw(np.random.default_rng(seed), drawn, [0, 1], 96)
        words = scene.caption.partition(" on ")[0].replace(" and ", ", ").split(", ")
        assert len(words) == len(scene.objects) == scene.instances.max()
        for number, (placed, word) in enumerate(zip(scene.objects, reversed(words), strict=True), 1):
            kind = drawn.identities[drawn.identity[placed.sprite]]
            assert word.split(" ", 1)[1] in (kind.name, kind.cls)
            mine = scene.instances == number
            assert set(scene.classes[mine]) == {1 + list(sprites.CLASSES).index(kind.cls)}
            assert mine.sum() >= 0.9 * scenes.VISIBLE * scenes._area(drawn.images[placed.sprite], placed.to_scene)
            y, x = np.nonzero(mine)  # back to sprite coordinates: all inside the sprite
            inside = np.linalg.solve(placed.to_scene[:, :2], np.stack([x + 0.5, y + 0.5]) - placed.to_scene[:, 2:])
            assert np.abs(inside).max() < 1.05


def test_matched_points_show_the_same_thing(drawn):
    """The square's bright corner is bright in both scenes, and nothing else of it is."""
    for seed in range(5):
        source, target, row = evaluation_set.pair(np.random.default_rng(seed), drawn, np.array([1]))
        for a, b in zip(row["source_points"], row["target_points"], strict=True):
            reds = [int(image[int(y), int(x), 0]) for image, (x, y) in ((source, a), (target, b))]
            assert (reds[0] > 128) == (reds[1] > 128), (seed, a, b, reds)


def test_packages_that_cannot_be_had(tmp_path, monkeypatch):
    package = sprites.Package("@some/artwork", "1.0.0", "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"@some/artwork: fetching it needs npm.*put some-artwork-1.0.0.tgz into"):
        package.archive(tmp_path / "packages")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'the registry does not answer' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(
        SystemExit, match=r"@some/artwork@1.0.0 could not be fetched(.|\n)*the registry does not answer(.|\n)*Try again"
    ):
        package.archive(tmp_path / "packages")
    half = tmp_path / "packages" / "some-artwork-1.0.0.tgz"
    half.write_bytes(b"the first half of it")
    with pytest.raises(
        SystemExit,
        match=r"some-artwork-1.0.0.tgz is not @some/artwork@1.0.0 as pinned \(half downloaded, or changed\).*Delete it",
    ):
        package.archive(tmp_path / "packages")


def test_the_tokenizer_knows_its_captions_and_takes_any_text():
    tokens = vocabulary.tokenizer(["a red apple on gravel", "an apple and a red house on gravel"] * 20)
    assert len(tokens("a red apple").input_ids) == 2 + 3
    assert tokens.decode(tokens("zürich, 1%").input_ids, skip_special_tokens=True).replace(" ", "") == "zürich,1%"
    assert tokens.pad_token_id == tokens.eos_token_id


def test_the_wheel_works_somewhere_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import diffusion_backbones as db
from diffusion_backbones.evaluation.scenes import load_scenes
from torchvision.transforms.functional import to_tensor
image = load_scenes().scenes[0].image
maps = db.create_model("tinysd_gdf", pretrained=True)(to_tensor(image)[None] * 2 - 1)
print(db.__file__, [tuple(m.shape) for m in maps])
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith(str(tmp_path))
    assert out.endswith("[(1, 48, 32, 32), (1, 96, 16, 16), (1, 224, 8, 8)]\n")
