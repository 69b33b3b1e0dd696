"""Draw the evaluation set that travels in the package (read by ``diffusion_backbones.evaluation.scenes.load_scenes``).

python scripts/tinysd/evaluation_set.py build/tinysd [--target diffusion_backbones/evaluation/data/scenes]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import scenes
import sprites
from PIL import Image
from scipy.ndimage import binary_erosion

SIDE = 256
POINTS = 8
"""Keypoints of an object at most; a pair with fewer than half of them visible in both scenes is drawn again."""
SEED = 1_000_003
SPLITS = {
    "probe": (80, False, False),
    "scenes": (40, False, False),
    "identities": (30, True, False),
    "style": (30, False, True),
}
"""Number of scenes, whether identities are those held out of training, and whether the style is."""
PAIRS = {"identities": (30, True, False), "style": (30, False, True)}


def save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=88, optimize=True)


def keypoints(sprite: np.ndarray) -> np.ndarray:
    """Points (POINTS, 2) well inside a sprite and far from each other, in its coordinates [-1, 1]."""
    inside = np.argwhere(binary_erosion(sprite[..., 3] > 200, iterations=5))[:, ::-1]
    if len(inside) == 0:
        return np.empty((0, 2))
    chosen = [inside[np.linalg.norm(inside - inside.mean(0), axis=1).argmax()]]
    while len(chosen) < POINTS:
        distance = np.min([np.linalg.norm(inside - c, axis=1) for c in chosen], axis=0)
        chosen.append(inside[distance.argmax()])
    return (np.array(chosen) + 0.5) / sprites.SIDE * 2 - 1


def pair(
    rng: np.random.Generator, everything: sprites.Sprites, choice: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Two scenes with one object, and where its points are in both."""
    while True:
        index = int(rng.choice(choice))
        points = keypoints(everything.images[index])
        drawn = [scenes.draw(rng, everything, choice, SIDE, first=index, mirror=False) for _ in range(2)]
        if not len(points) or any(not scene.objects or scene.objects[0].sprite != index for scene in drawn):
            continue
        placed = [points @ scene.objects[0].to_scene[:, :2].T + scene.objects[0].to_scene[:, 2] for scene in drawn]
        inside = [((p >= 0) & (p < SIDE)).all(1) for p in placed]
        pixels = [np.clip(p.astype(int), 0, SIDE - 1) for p in placed]
        seen = np.logical_and.reduce(
            [i & (s.instances[p[:, 1], p[:, 0]] == 1) for i, s, p in zip(inside, drawn, pixels, strict=True)]
        )
        if seen.sum() < POINTS // 2:
            continue
        y, x = np.nonzero(drawn[1].instances == 1)
        row = {
            key: np.round(p[seen], 2).tolist()
            for key, p in zip(("source_points", "target_points"), placed, strict=True)
        }
        box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        return (
            drawn[0].image,
            drawn[1].image,
            {**row, "target_box": box, "object": everything.identities[everything.identity[index]].name},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--target", type=Path, default=Path(__file__).parents[2] / "diffusion_backbones/evaluation/data/scenes"
    )
    args = parser.parse_args()
    everything = sprites.load(args.folder)
    index: dict[str, object] = {"classes": ["background", *sprites.CLASSES]}
    captions: dict[str, list[str]] = {}
    for number, (name, (count, held_out, other_style)) in enumerate(SPLITS.items()):
        folder = args.target / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        captions[name] = []
        for i in range(count):
            scene = scenes.draw(
                np.random.default_rng([SEED, number, i]), everything, everything.where(held_out, other_style), SIDE
            )
            save(scene.image, folder / f"{i:03}.jpg")
            Image.merge("LA", [Image.fromarray(scene.classes), Image.fromarray(scene.instances)]).save(
                folder / f"{i:03}.png", optimize=True
            )
            captions[name].append(scene.caption)
    rows = []
    shutil.rmtree(args.target / "pairs", ignore_errors=True)
    (args.target / "pairs").mkdir()
    for number, (split, (count, held_out, other_style)) in enumerate(PAIRS.items()):
        for i in range(count):
            source, target, row = pair(
                np.random.default_rng([SEED, 100 + number, i]), everything, everything.where(held_out, other_style)
            )
            save(source, args.target / "pairs" / f"{len(rows):03}-source.jpg")
            save(target, args.target / "pairs" / f"{len(rows):03}-target.jpg")
            rows.append({"split": split, **row})
    index |= {"splits": captions, "pairs": rows}
    (args.target / "scenes.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    size = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    print(f"{args.target}: {size / 2**20:.2f} MiB, {sum(map(len, captions.values()))} scenes and {len(rows)} pairs")


if __name__ == "__main__":
    main()
