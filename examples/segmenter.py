"""Semantic segmentation: a decoder of segmentation_models_pytorch on a frozen diffusion backbone.

    python examples/segmenter.py [--output DIR] [--backbone tinysd_gdf] [--steps N] [--seed S]

An FPN decoder learns 16 classes from 80 scenes and their mirror images, once on the trained backbone and once on the
same network with random weights: same seed, same batches, same number of steps. The backbone runs once per image, since
it stays frozen; the decoder trains on the maps that are kept. Drawn are the four scenes in the middle of the order by
the mIoU of the trained one. Needs pip install '.[smp,train]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from common import DEVICE, History, backbones, median, options, pixels, report
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor
from tqdm import tqdm

import diffusion_backbones as db
from diffusion_backbones.evaluation import Scene, load_scenes, mean_iou
from diffusion_backbones.integrations.smp import register

BATCH, SHOWN = 8, 4


def build(backbone: db.DiffusionBackbone, classes: int) -> smp.FPN:
    small = {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32, "upsampling": 1}
    return smp.FPN(register(backbone), encoder_weights=None, classes=classes, **small).to(DEVICE)


@torch.no_grad()
def features(model: smp.FPN, x: Tensor, name: str) -> list[Tensor]:
    """Images (N, 3, S, S) in [-1, 1] -> what the decoder reads: one tensor (N, C, h, w) a level."""
    batches = [
        [level.cpu() for level in model.encoder(batch.to(DEVICE))]
        for batch in tqdm(x.split(4), name, leave=False, disable=None)
    ]
    return [torch.cat(level) for level in zip(*batches, strict=True)]


def classes(scenes: Sequence[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([scene.classes for scene in scenes])).long()


def logits(model: smp.FPN, maps: list[Tensor]) -> Tensor:
    """Maps of some images -> (B, classes, S / 4, S / 4)."""
    return model.segmentation_head(model.decoder([m.to(DEVICE) for m in maps]))


@torch.no_grad()
def predict(model: smp.FPN, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """-> (N, *size), the class of every pixel."""
    batches = (logits(model.eval(), [m[i : i + BATCH] for m in maps]) for i in range(0, len(maps[0]), BATCH))
    return torch.cat([F.interpolate(batch, size, mode="bilinear").argmax(1).cpu() for batch in batches])


def train(
    model: smp.FPN,
    maps: list[Tensor],
    truth: Tensor,
    held_out: list[Tensor],
    held_out_truth: Tensor,
    count: int,
    steps: int,
    seed: int,
) -> History:
    """The loss of every step, and the mIoU on held-out scenes five times on the way."""
    size = (truth.shape[-2], truth.shape[-1])
    torch.manual_seed(seed)
    small = truth[:, 2::4, 2::4]
    weight = (
        torch.bincount(small.flatten(), minlength=count).clamp(min=1).rsqrt().to(DEVICE)
    )  # four fifths of all pixels are background
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    history: History = {"loss": [], "mIoU": []}
    for step in tqdm(range(1, steps + 1), "train", leave=False, disable=None):
        batch = torch.randperm(len(truth))[:BATCH]
        loss = F.cross_entropy(logits(model.train(), [m[batch] for m in maps]), small[batch].to(DEVICE), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history["loss"].append((step, loss.item()))
        if step % max(1, steps // 5) == 0:
            history["mIoU"].append((step, mean_iou(held_out_truth, predict(model, held_out, size), range(count))))
    return history


def picture(path: Path, scenes: Sequence[Scene], guesses: dict[str, Tensor], names: Sequence[str]) -> None:
    """Scenes, their classes, and what each model says they are."""
    colours = ListedColormap(["black", *plt.get_cmap("tab20").colors[: len(names) - 1]])
    columns = {"image": [scene.image for scene in scenes], "truth": [scene.classes for scene in scenes]}
    columns |= {f"{name} backbone": list(guess) for name, guess in guesses.items()}
    figure, axes = plt.subplots(
        len(scenes),
        len(columns),
        figsize=(2.2 * len(columns), 2.2 * len(scenes) + 1),
        layout="constrained",
        squeeze=False,
    )
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for axis, shown in zip(axes[:, column], pictures, strict=True):
            axis.imshow(shown, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
            axis.axis("off")
    figure.legend(
        handles=[Patch(color=colours(i), label=name) for i, name in enumerate(names)],
        loc="outside lower center",
        ncols=6,
        fontsize=8,
    )
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 70})
    plt.close(figure)


def main() -> None:
    args = options(__doc__, steps=150)
    data = load_scenes(args.scenes)
    splits = {name: getattr(data, name) for name in ("scenes", "identities", "style")}
    truth = {name: classes(scenes) for name, scenes in splits.items()}
    probe, size = classes(data.probe), (256, 256)
    rows, histories, guesses = {}, {}, {}
    for name, backbone in backbones(args.backbone, args.seed).items():
        torch.manual_seed(args.seed)
        model = build(backbone, len(data.classes))
        images = pixels(backbone, [scene.image for scene in data.probe])
        maps = features(model, torch.cat([images, images.flip(-1)]), f"{name}: maps of the scenes to train on")
        held_out = {
            split: features(model, pixels(backbone, [scene.image for scene in scenes]), f"{name}: {split}")
            for split, scenes in splits.items()
        }
        histories[name] = train(
            model,
            maps,
            torch.cat([probe, probe.flip(-1)]),
            held_out["scenes"],
            truth["scenes"],
            len(data.classes),
            args.steps,
            args.seed,
        )
        found = {split: predict(model, held_out[split], size) for split in splits}
        rows[f"{name}: mIoU"] = {
            split: mean_iou(truth[split], found[split], range(len(data.classes))) for split in splits
        }
        rows[f"{name}: IoU of objects"] = {
            split: mean_iou(truth[split] > 0, found[split] > 0, [True]) for split in splits
        }
        guesses[name] = found["scenes"]
    each = [mean_iou(t, g, range(len(data.classes))) for t, g in zip(truth["scenes"], guesses["trained"], strict=True)]
    shown = median(each, SHOWN)
    print("intersection over union in per cent")
    report(args.output / "segmenter", rows, histories)
    chosen = {name: guess[shown] for name, guess in guesses.items()}
    picture(args.output / "segmenter.jpg", [data.scenes[i] for i in shown], chosen, data.classes)


if __name__ == "__main__":
    main()
