"""Object detection: torchvision's FCOS on a frozen diffusion backbone.

    python examples/detector.py [--output DIR] [--backbone tinysd_gdf] [--steps N] [--seed S]

A feature pyramid network and the heads of FCOS learn the boxes and the 15 classes of 80 scenes and their mirror images,
once on the trained backbone and once on the same network with random weights: same seed, same batches, same number of
steps. The backbone runs once per image, since it stays frozen; what trains reads the maps that are kept. Drawn are the
four scenes in the middle of the order by how well the trained one's surest boxes cover the true ones. Needs pip install
'.[train]' pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import COLOURS, DEVICE, History, backbones, median, options, report
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import box_iou, masks_to_boxes, nms
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import diffusion_backbones as db
from diffusion_backbones.evaluation import Scene, load_scenes
from diffusion_backbones.integrations.torchvision import PyramidFPN

BATCH, SHOWN = 8, 4
Maps = dict[str, Tensor]
Target = dict[str, Tensor]


class Kept(nn.Module):
    """Replaces the backbone, and returns the maps that were computed before for the images of a batch."""

    maps: Maps

    def forward(self, _: Tensor) -> Maps:
        return self.maps


def build(backbone: db.DiffusionBackbone, classes: int) -> FCOS:
    body = PyramidFPN(backbone, out_channels=64, extra="p6p7")
    anchors, head = body.anchors(1, ratios=(1.0,)), FCOSHead(64, 1, classes, num_convs=2)
    side = backbone.pretrained_cfg["input_size"][-1]
    return FCOS(
        body,
        classes,
        min_size=side,
        max_size=side,
        anchor_generator=anchors,
        head=head,
        score_thresh=0.05,
        **body.transform,
    ).to(DEVICE)


@torch.no_grad()
def features(detector: FCOS, images: Sequence[Tensor], name: str) -> Maps:
    """Images (3, H, W) in [0, 1] -> the backbone's maps of them, (N, C, h, w) each."""
    maps = [
        detector.backbone.body(detector.transform([image.to(DEVICE)])[0].tensors)
        for image in tqdm(images, name, leave=False, disable=None)
    ]
    return {level: torch.cat([m[level].cpu() for m in maps]) for level in maps[0]}


def run(
    detector: FCOS, images: Sequence[Tensor], maps: Maps, which: Sequence[int], targets: Sequence[Target] | None = None
) -> Any:
    """The detector on some of the images: losses if there are targets, otherwise boxes."""
    detector.backbone.body.maps = {level: m[which].to(DEVICE) for level, m in maps.items()}
    wanted = [{key: value.to(DEVICE) for key, value in targets[i].items()} for i in which] if targets else None
    return detector([images[i].to(DEVICE) for i in which], wanted)


@torch.no_grad()
def predict(detector: FCOS, images: Sequence[Tensor], maps: Maps) -> list[Target]:
    """What is found, surest first; of boxes that overlap the surest, since the detector itself keeps one a class."""
    found = [run(detector.eval(), images, maps, [i])[0] for i in range(len(images))]
    return [{key: value[nms(f["boxes"], f["scores"], 0.5)].cpu() for key, value in f.items()} for f in found]


def target(scene: Scene) -> Target:
    """Boxes (n, 4) in pixels as x0, y0, x1, y1, and classes (n,) from 1 on."""
    instances, classes = torch.tensor(scene.instances), torch.tensor(scene.classes).long()
    masks = torch.stack([instances == i for i in range(1, int(instances.max()) + 1)])
    return {
        "boxes": masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]),
        "labels": torch.stack([classes[mask][0] for mask in masks]),
    }


def mirrored(wanted: Target, width: int) -> Target:
    x0, y0, x1, y1 = wanted["boxes"].T
    return wanted | {"boxes": torch.stack([width - x1, y0, width - x0, y1], 1)}


def average_precision(found: Sequence[Target], truth: Sequence[Target], by_class: bool) -> float:
    """COCO's AP at an IoU of 0.5 in per cent: the mean over classes, or of boxes whatever their class."""

    def entries(targets: Sequence[Target]) -> list[dict[str, Any]]:
        rows = []
        for image, t in enumerate(targets):
            for (x0, y0, x1, y1), label, score in zip(
                t["boxes"].tolist(), t["labels"].tolist(), t.get("scores", t["labels"]).tolist(), strict=True
            ):
                row = {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                }
                rows.append(row | {"score": score, "iscrowd": 0})
        return rows

    guesses = entries(found)
    if not guesses:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        annotations = entries(truth)
        categories = [{"id": label} for label in sorted({row["category_id"] for row in annotations})]
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": categories,
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(guesses), "bbox")
        evaluation.params.useCats = int(by_class)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[1])


def covered(found: Target, true: Target) -> float:
    """Mean over the true boxes of the IoU with the best of as many boxes as there are objects, the surest ones."""
    surest = found["boxes"][: len(true["boxes"])]
    return float(box_iou(true["boxes"].float(), surest).amax(1).mean()) if len(surest) else 0.0


def train(
    detector: FCOS,
    images: list[Tensor],
    maps: Maps,
    targets: list[Target],
    steps: int,
    seed: int,
    measure: Callable[[FCOS], float],
) -> History:
    """The loss of every step, and ``measure`` five times on the way."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    history: History = {"loss": [], "AP at IoU 0.5, any class": []}
    for step in tqdm(range(1, steps + 1), "train", leave=False, disable=None):
        loss = sum(run(detector.train(), images, maps, torch.randperm(len(images))[:BATCH].tolist(), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1)
        optimizer.step()
        schedule.step()
        history["loss"].append((step, loss.item()))
        if step % max(1, steps // 5) == 0:
            history["AP at IoU 0.5, any class"].append((step, measure(detector)))
    return history


def picture(path: Path, images: Sequence[Tensor], rows: dict[str, Sequence[Target]], names: Sequence[str]) -> None:
    """Scenes with the true boxes, and with what each detector is surest of: as many boxes as there are objects."""
    figure, axes = plt.subplots(
        len(rows), len(images), figsize=(2.9 * len(images), 3 * len(rows)), layout="constrained", squeeze=False
    )
    for row, (title, targets) in enumerate(rows.items()):
        for axis, image, shown, true in zip(axes[row], images, targets, rows["truth"], strict=True):
            axis.imshow(image.permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            count, colour = len(true["boxes"]), COLOURS.get(title, "white")
            for (x0, y0, x1, y1), label in zip(shown["boxes"][:count].tolist(), shown["labels"].tolist(), strict=False):
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2))
                axis.text(
                    x0 + 2,
                    y0 + 2,
                    names[label],
                    fontsize=7,
                    va="top",
                    color="black",
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
                )
        axes[row, 0].set_ylabel(title if title == "truth" else f"{title} backbone")
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 70})
    plt.close(figure)


def main() -> None:
    args = options(__doc__, steps=150)
    data = load_scenes(args.scenes)
    splits = {name: getattr(data, name) for name in ("scenes", "identities", "style")}
    held_out = {split: [to_tensor(scene.image) for scene in scenes] for split, scenes in splits.items()}
    truth = {split: [target(scene) for scene in scenes] for split, scenes in splits.items()}
    images = [to_tensor(scene.image) for scene in data.probe]
    targets = [target(scene) for scene in data.probe]
    targets += [mirrored(t, images[0].shape[-1]) for t in targets]
    images += [image.flip(-1) for image in images]
    rows, histories, found = {}, {}, {"truth": truth["scenes"]}
    for name, backbone in backbones(args.backbone, args.seed, out_strides=(8, 16, 32)).items():
        torch.manual_seed(args.seed)
        detector = build(backbone, len(data.classes))
        maps = features(detector, images, f"{name}: maps of the scenes to train on")
        kept = {split: features(detector, held_out[split], f"{name}: {split}") for split in splits}
        detector.backbone.body = Kept()

        def ap(detector: FCOS, split: str = "scenes", by_class: bool = False, kept: dict[str, Maps] = kept) -> float:
            return average_precision(predict(detector, held_out[split], kept[split]), truth[split], by_class)

        histories[name] = train(detector, images, maps, targets, args.steps, args.seed, ap)
        rows[f"{name}: AP, any class"] = {split: ap(detector, split) for split in splits}
        rows[f"{name}: AP, 15 classes"] = {split: ap(detector, split, by_class=True) for split in splits}
        found[name] = predict(detector, held_out["scenes"], kept["scenes"])
    print("AP at an IoU of 0.5, in per cent")
    report(args.output / "detector", rows, histories)
    shown = median([covered(f, t) for f, t in zip(found["trained"], found["truth"], strict=True)], SHOWN)
    drawn = {name: [targets[i] for i in shown] for name, targets in found.items()}
    picture(args.output / "detector.jpg", [held_out["scenes"][i] for i in shown], drawn, data.classes)


if __name__ == "__main__":
    main()
