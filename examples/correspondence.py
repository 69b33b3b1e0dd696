"""Matching keypoints: a small head that learns from warped images, on a frozen diffusion backbone.

    python examples/correspondence.py [--output DIR] [--backbone tinysd_gdf] [--steps N] [--seed S]

Every one of 80 scenes is turned, scaled, moved and tinted twice. A 1x1 convolution learns that the same point of two
such views belongs together and all others do not (InfoNCE); no label is used. It is then asked for the keypoints of 60
pairs of scenes that share one object. Once on the trained backbone and once on the same network with random weights:
same seed, same views, same number of steps. The backbone runs once per view, since it stays frozen. Drawn are the four
pairs in the middle of the order by PCK of the trained one with its head. Needs pip install '.[train]'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, History, backbones, median, options, pixels, report
from torch import Tensor, nn
from torchvision.transforms import ColorJitter
from tqdm import tqdm

import diffusion_backbones as db
from diffusion_backbones.evaluation import Pair, correct_keypoints, load_scenes, pck

VIEWS, BATCH, POINTS, TEMPERATURE, GRID, SHOWN = 2, 8, 96, 0.07, 64, 4
Head = Callable[[Tensor], Tensor]
"""Descriptors (B, C, N, 1) -> descriptors (B, D, N, 1)."""


def warps(count: int) -> Tensor:
    """Random maps (count, 2, 3) from places in a view to places in its scene, both in [-1, 1]."""
    angle, scale, shift = (
        (torch.rand(count) - 0.5) * 1.4,
        1.6 ** (torch.rand(count) * 2 - 1),
        (torch.rand(count, 2) - 0.5) * 0.5,
    )
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)


def views(images: Tensor, warp: Tensor) -> Tensor:
    """Images (N, 3, S, S) in [-1, 1], each under one warp and in other colours."""
    warped = F.grid_sample(
        images,
        F.affine_grid(warp, list(images.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.08)
    return torch.stack([jitter(image) for image in warped.clamp(-1, 1) / 2 + 0.5]) * 2 - 1


@torch.no_grad()
def features(backbone: db.DiffusionBackbone, x: Tensor, name: str) -> list[Tensor]:
    """Images (N, 3, S, S) in [-1, 1] -> maps (N, C, h, w), fine to coarse."""
    batches = [
        [level.cpu() for level in backbone(batch.to(DEVICE))]
        for batch in tqdm(x.split(4), name, leave=False, disable=None)
    ]
    return [torch.cat(level) for level in zip(*batches, strict=True)]


def describe(maps: Sequence[Tensor], which: Tensor | Sequence[int], places: Tensor) -> Tensor:
    """Features of some images at places (B, N, 2), x and y in [-1, 1] -> (B, C, N, 1), every level of unit length."""
    levels = [
        F.grid_sample(m[which].to(DEVICE), places[:, :, None].to(DEVICE), padding_mode="border", align_corners=False)
        for m in maps
    ]
    return torch.cat([F.normalize(level, dim=1) for level in levels], 1)


def contrast(head: Head, maps: Sequence[Tensor], warp: Tensor) -> Tensor:
    """InfoNCE on matching points of the views of some scenes, each against all points of the batch."""
    scenes = torch.randperm(len(warp) // VIEWS)[:BATCH]
    first, second = (scenes + len(warp) // VIEWS * view for view in range(VIEWS))
    a = torch.rand(len(scenes), 4 * POINTS, 2) * 1.8 - 0.9
    (linear_a, shift_a), (linear_b, shift_b) = ((w[:, :, :2], w[:, None, :, 2]) for w in (warp[first], warp[second]))
    b = (a @ linear_a.mT + shift_a - shift_b) @ torch.linalg.inv(linear_b).mT
    inside = (
        (b.abs() < 0.9).all(-1).float().argsort(dim=1, descending=True, stable=True)[:, :POINTS]
    )  # points that both views show come first
    a, b = (p.gather(1, inside[..., None].expand(-1, -1, 2)) for p in (a, b))
    seen = (b.abs() < 0.9).all(-1).flatten().to(DEVICE)
    x, y = (
        F.normalize(head(describe(maps, w, p)), dim=1).squeeze(3).transpose(1, 2).flatten(0, 1)[seen]
        for w, p in ((first, a), (second, b))
    )
    similarity, same = x @ y.T / TEMPERATURE, torch.arange(len(x), device=DEVICE)
    return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2


@torch.no_grad()
def match(head: Head, maps: Sequence[Tensor], index: int, count: int, pair: Pair) -> np.ndarray:
    """The places of the target that are most similar to the source points of a pair, (K, 2) in pixels."""
    width = pair.source.width
    line = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    everywhere = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 2)
    queries = torch.from_numpy(pair.source_points)[None] / (width / 2) - 1
    source, target = (
        F.normalize(head(describe(maps, [i], p)), dim=1)[0, :, :, 0]
        for i, p in ((index, queries), (count + index, everywhere))
    )
    best = (source.T @ target).argmax(1).cpu()
    return ((everywhere[0, best] + 1) * width / 2).numpy()


def correct(found: np.ndarray, pair: Pair) -> np.ndarray:
    """Which of the points lie within 0.1 of the longer side of the object's box."""
    x0, y0, x1, y1 = pair.target_box
    return correct_keypoints(found, pair.target_points, max(x1 - x0, y1 - y0))


def measure(head: Head, maps: Sequence[Tensor], pairs: Sequence[Pair]) -> dict[str, float]:
    """PCK@0.1 in per cent, by split and of all."""
    hits = [correct(match(head, maps, i, len(pairs), pair), pair) for i, pair in enumerate(pairs)]
    splits = {
        split: [h for h, pair in zip(hits, pairs, strict=True) if pair.split == split]
        for split in ("identities", "style")
    }
    return {split: pck(h) for split, h in (splits | {"both": hits}).items()}


def train(
    maps: Sequence[Tensor], warp: Tensor, held_out: Sequence[Tensor], pairs: Sequence[Pair], steps: int, seed: int
) -> tuple[nn.Module, History]:
    torch.manual_seed(seed)
    channels = sum(m.shape[1] for m in maps)
    head = nn.Conv2d(channels, 128, 1).to(DEVICE)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    history: History = {"loss": [], "PCK@0.1": []}
    for step in tqdm(range(1, steps + 1), "train", leave=False, disable=None):
        loss = contrast(head, maps, warp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history["loss"].append((step, loss.item()))
        if step % max(1, steps // 6) == 0:
            history["PCK@0.1"].append((step, measure(head, held_out, pairs)["both"]))
    return head, history


def picture(path: Path, pairs: Sequence[Pair], found: dict[str, list[np.ndarray]]) -> None:
    """The points in the source, in the target, and where each head finds them: a cross for a wrong one."""
    columns = {"source": [p.source_points for p in pairs], "truth": [p.target_points for p in pairs]} | {
        f"{k} backbone": v for k, v in found.items()
    }
    figure, axes = plt.subplots(
        len(pairs),
        len(columns),
        figsize=(2.4 * len(columns), 2.4 * len(pairs) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for column, (title, points) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for axis, pair, xy in zip(axes[:, column], pairs, points, strict=True):
            axis.imshow(pair.source if title == "source" else pair.target)
            axis.axis("off")
            right = np.ones(len(xy), bool) if column < 2 else correct(xy, pair)
            colours = plt.get_cmap("hsv")(np.arange(len(xy)) / len(xy))
            axis.scatter(*xy[right].T, c=colours[right], s=45, edgecolors="white")
            axis.scatter(*xy[~right].T, c=colours[~right], s=45, marker="X", edgecolors="black")
            if column > 1:
                axis.set_title(f"{title}: {right.sum()} of {len(xy)}", fontsize=10)
    figure.supxlabel(
        "dot: within 0.1 of the longer side of the object's box; cross: missed; one colour is one keypoint", fontsize=9
    )
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 70})
    plt.close(figure)


def main() -> None:
    args = options(__doc__, steps=300)
    data = load_scenes(args.scenes)
    torch.manual_seed(args.seed)
    warp = warps(VIEWS * len(data.probe))
    rows, histories, found = {}, {}, {}
    for name, backbone in backbones(args.backbone, args.seed).items():
        torch.manual_seed(args.seed)
        x = views(pixels(backbone, [scene.image for scene in data.probe]).repeat(VIEWS, 1, 1, 1), warp)
        maps = features(backbone, x, f"{name}: maps of the views")
        held_out = features(
            backbone,
            pixels(backbone, [p.source for p in data.pairs] + [p.target for p in data.pairs]),
            f"{name}: maps of the pairs",
        )
        rows[f"{name}: no head"] = measure(nn.Identity(), held_out, data.pairs)
        head, histories[name] = train(maps, warp, held_out, data.pairs, args.steps, args.seed)
        rows[f"{name}: head"] = measure(head, held_out, data.pairs)
        found[name] = [match(head, held_out, i, len(data.pairs), pair) for i, pair in enumerate(data.pairs)]
    print("PCK@0.1 in per cent")
    report(args.output / "correspondence", rows, histories)
    shown = median([pck([correct(*of)]) for of in zip(found["trained"], data.pairs, strict=True)], SHOWN)
    drawn = {name: [matched[i] for i in shown] for name, matched in found.items()}
    picture(args.output / "correspondence.jpg", [data.pairs[i] for i in shown], drawn)


if __name__ == "__main__":
    main()
