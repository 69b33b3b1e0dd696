"""A decoder of every library on four kinds of pyramid, of the real topologies and tiny width: what ``test_decoders.py``
runs and the docs show.

python tests/decoders.py                 write docs/decoders/table.csv; scripts/generate.py makes the table of
docs/decoders/README.md from it
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import detectron2_source  # noqa: F401  # before detectron2 itself
import mmdet_source  # noqa: F401  # before mmdet itself

# isort: split
import detectron2
import detectron2.config
import detectron2.modeling
import mmdet.models
import mmdet.registry
import numpy as np
import segmentation_models_pytorch
import tiny
import torch
import torch.nn.functional as F
import transformers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import masks_to_boxes

import diffusion_backbones as db
import diffusion_backbones.integrations.openmmlab  # registers itself
from diffusion_backbones.integrations.detectron2 import add_diffusion_config
from diffusion_backbones.integrations.smp import register
from diffusion_backbones.integrations.torchvision import PyramidFPN
from diffusion_backbones.integrations.transformers import DiffusionBackboneConfig

TABLE = Path(__file__).parent.parent / "docs" / "decoders" / "table.csv"
BACKBONES: dict[str, dict[str, Any]] = {
    "sd15_gdf": {"name": "sd15_gdf"},
    "sdxl_gdf": {"name": "sdxl_gdf"},
    "sd21_probe3d": {"name": "sd21_probe3d"},  # one level
    "sd15_gdf, resampled": {"name": "sd15_gdf", "out_strides": (4, 8, 16, 32)},
}
STEPS, SIZE, ODD = 20, (64, 64), (75, 101)
original = functools.cache(db.create_model)  # a backbone without any library, built once: frozen, it has no state


class Decoder(NamedTuple):
    """A model of some library on a backbone. Pixels are RGB, (B, 3, H, W) uint8; labels are (B, H, W), 0 and one
    rectangle of 1.
    """

    model: nn.Module
    source: nn.Module  # what gives the decoder its maps
    maps: Callable[[Any], Sequence[Tensor]]  # what ``source`` returns -> maps, fine to coarse
    loss: Callable[[Tensor, Tensor], Tensor]  # pixels, labels -> ()
    predict: Callable[[Tensor], Tensor]  # pixels of one image -> masks or scores (N, H, W)
    strides: tuple[int, ...] | None = None  # that the library wants of any backbone


def symmetric(pixels: Tensor) -> Tensor:
    return pixels / 127.5 - 1


def timm(backbone: Mapping[str, Any]) -> Decoder:
    """By way of timm's registry alone, in mmsegmentation's own wrapper."""
    keywords = {
        "model_name" if key == "name" else key: value for key, value in backbone.items() if key != "checkpoint_path"
    }
    return mmseg(
        dict(
            type="TIMMBackbone",
            features_only=True,
            pretrained_cfg_overlay=dict(file=backbone["checkpoint_path"]),
            **keywords,
        ),
        backbone,
    )


def openmmlab(backbone: Mapping[str, Any]) -> Decoder:
    return mmseg(dict(type="DiffusionBackbone", **backbone), backbone)


def mmseg(cfg: dict[str, Any], backbone: Mapping[str, Any]) -> Decoder:
    register_all_modules(init_default_scope=True)
    channels = original(**backbone).feature_info.channels()
    head = dict(
        type="UPerHead",
        in_channels=channels,
        in_index=list(range(len(channels))),
        channels=16,
        num_classes=2,
        pool_scales=(1, 2),
    )
    head |= dict(norm_cfg=dict(type="BN"), align_corners=False, loss_decode=dict(type="CrossEntropyLoss"))
    pixels = dict(
        type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, seg_pad_val=255, size=SIZE
    )
    model = MODELS.build(
        ConfigDict(
            type="EncoderDecoder",
            data_preprocessor=pixels,
            backbone=cfg,
            decode_head=head,
            train_cfg={},
            test_cfg=dict(mode="whole"),
        )
    )

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        size = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), tuple(labels.shape[1:]))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None]), metainfo=size) for label in labels]
        data = model.data_preprocessor(dict(inputs=list(pixels.flip(1)), data_samples=samples), True)
        return model.parse_losses(model(**data, mode="loss"))[0]

    def predict(pixels: Tensor) -> Tensor:
        data = model.data_preprocessor(dict(inputs=list(pixels.flip(1))), False)
        return model(**data, mode="predict")[0].seg_logits.data

    return Decoder(model, model.backbone, tuple, loss, predict)


def mmdetection(backbone: Mapping[str, Any]) -> Decoder:
    info, width = original(**backbone).feature_info, 16
    channels, strides = info.channels(), info.reduction()
    anchors = dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[*strides, 2 * strides[-1]])
    nms = dict(type="nms", iou_threshold=0.7)
    few = dict(nms_pre=50, max_per_img=20, nms=nms, min_bbox_size=0)

    def extractor(size: int) -> dict[str, Any]:
        layer = dict(type="RoIAlign", output_size=size, sampling_ratio=0, use_torchvision=True)
        return dict(type="SingleRoIExtractor", roi_layer=layer, out_channels=width, featmap_strides=strides)

    def assign(high: float, low: float, with_truth: bool, **more: Any) -> dict[str, Any]:
        assigner = dict(type="MaxIoUAssigner", pos_iou_thr=high, neg_iou_thr=low, min_pos_iou=low)
        sampler = dict(type="RandomSampler", num=32, pos_fraction=0.5, add_gt_as_proposals=with_truth)
        return dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False, **more)

    cfg = dict(
        type="MaskRCNN",
        data_preprocessor=dict(
            type="DetDataPreprocessor",
            mean=[127.5] * 3,
            std=[127.5] * 3,
            bgr_to_rgb=True,
            pad_mask=True,
            pad_size_divisor=32,
        ),
        backbone=dict(type="DiffusionBackbone", **backbone),
        neck=dict(type="FPN", in_channels=channels, out_channels=width, num_outs=len(channels) + 1),
        rpn_head=dict(type="RPNHead", in_channels=width, feat_channels=width, anchor_generator=anchors),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=extractor(7),
            bbox_head=dict(
                type="Shared2FCBBoxHead", in_channels=width, fc_out_channels=width, roi_feat_size=7, num_classes=1
            ),
            mask_roi_extractor=extractor(14),
            mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=width, conv_out_channels=8, num_classes=1),
        ),
        train_cfg=dict(
            rpn=assign(0.7, 0.3, False, allowed_border=-1), rpn_proposal=few, rcnn=assign(0.5, 0.5, True, mask_size=28)
        ),
        test_cfg=dict(rpn=few, rcnn=dict(score_thr=0.0, nms=nms, max_per_img=3, mask_thr_binary=0.5)),
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = mmdet.registry.MODELS.build(ConfigDict(cfg))

    def prepared(pixels: Tensor, labels: Tensor, training: bool) -> dict[str, Any]:
        samples = []
        for label in labels:
            size = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), tuple(label.shape))
            sample = DetDataSample(metainfo=size | {"scale_factor": (1.0, 1.0)})
            masks = BitmapMasks(label[None].numpy().astype(np.uint8), *label.shape)
            sample.gt_instances = InstanceData(
                bboxes=masks_to_boxes(label[None]), labels=torch.zeros(1, dtype=torch.long), masks=masks
            )
            samples.append(sample)
        return model.data_preprocessor(dict(inputs=list(pixels.flip(1)), data_samples=samples), training)

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return model.parse_losses(model(**prepared(pixels, labels, True), mode="loss"))[0]

    def predict(pixels: Tensor) -> Tensor:
        return model(**prepared(pixels, torch.ones_like(pixels[:, 0], dtype=torch.long), False), mode="predict")[
            0
        ].pred_instances.masks

    return Decoder(model, model.backbone, tuple, loss, predict)


def smp(backbone: Mapping[str, Any]) -> Decoder:
    model = segmentation_models_pytorch.Unet(
        register(db.create_model(**backbone)), encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=2
    )

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(symmetric(pixels)), labels)

    return Decoder(
        model, model.encoder, lambda maps: maps[2:], loss, lambda x: model(symmetric(x))[0], strides=(4, 8, 16, 32)
    )


def uper_net(backbone: Mapping[str, Any]) -> Decoder:
    config = DiffusionBackboneConfig.from_backbone(db.create_model(**backbone))
    upernet = transformers.UperNetConfig(backbone_config=config, hidden_size=16, num_labels=2, use_auxiliary_head=False)
    model = transformers.UperNetForSemanticSegmentation(upernet)

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return model(pixel_values=symmetric(pixels), labels=labels).loss

    return Decoder(
        model,
        model.backbone,
        lambda output: output.feature_maps,
        loss,
        lambda x: model(pixel_values=symmetric(x)).logits[0],
    )


def torchvision(backbone: Mapping[str, Any]) -> Decoder:
    fpn = PyramidFPN(db.create_model(**backbone), 32)
    parts = dict(rpn_anchor_generator=fpn.anchors(), box_roi_pool=fpn.roi_align(7), mask_roi_pool=fpn.roi_align(14))
    heads = dict(box_head=TwoMLPHead(32 * 7 * 7, 64), box_predictor=FastRCNNPredictor(64, 2))
    heads |= dict(mask_head=MaskRCNNHeads(32, (16,), 1), mask_predictor=MaskRCNNPredictor(16, 16, 2))
    few = dict(rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20, box_score_thresh=0, box_detections_per_img=3)
    model = MaskRCNN(fpn, **parts, **heads, **few, _skip_resize=True, min_size=ODD[0], max_size=ODD[1], **fpn.transform)

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        targets = [
            {
                "boxes": masks_to_boxes(label[None]),
                "labels": torch.ones(1, dtype=torch.long),
                "masks": label[None].byte(),
            }
            for label in labels
        ]
        return sum(model(list(pixels / 255), targets).values())

    return Decoder(
        model, fpn.body, lambda maps: list(maps.values()), loss, lambda x: model(list(x / 255))[0]["masks"][:, 0]
    )


def detectron(backbone: Mapping[str, Any]) -> Decoder:
    strides = original(**backbone).feature_info.reduction()
    names = [f"p{stride.bit_length() - 1}" for stride in strides]
    cfg = detectron2.config.get_cfg()
    add_diffusion_config(cfg)
    cfg.MODEL.DIFFUSION.update({key.upper(): value for key, value in backbone.items()})
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = (
        "cpu",
        "",
        "GeneralizedRCNN",
        True,
    )
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.OUT_CHANNELS = "build_diffusion_fpn_backbone", 32
    cfg.MODEL.RPN.IN_FEATURES = [*names, f"p{strides[-1].bit_length()}"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8 * stride] for stride in (*strides, 2 * strides[-1])]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50, 20
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", names
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 1, 0.0, 3
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 1, 64, 7
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 1, 16, 14
    model = detectron2.modeling.build_model(cfg)

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        batch = []
        for image, label in zip(pixels, labels, strict=True):
            objects = Instances(
                tuple(label.shape),
                gt_boxes=Boxes(masks_to_boxes(label[None])),
                gt_classes=torch.zeros(1, dtype=torch.long),
            )
            objects.gt_masks = BitMasks(label[None].bool())
            batch.append({"image": image, "instances": objects})
        with EventStorage(0):
            return sum(model(batch).values())

    return Decoder(
        model,
        model.backbone.bottom_up,
        lambda maps: list(maps.values()),
        loss,
        lambda x: model([{"image": x[0]}])[0]["instances"].pred_masks,
    )


LIBRARIES: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], Decoder]]] = {  # distribution, decoder
    "timm": ("timm", "mmseg's TIMMBackbone, UPerHead", timm),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", "Unet", smp),
    "torchvision": ("torchvision", "MaskRCNN", torchvision),
    "transformers": ("transformers", "UperNet", uper_net),
    "mmsegmentation": ("onedl-mmsegmentation", "UPerHead", openmmlab),
    "mmdetection": ("onedl-mmdetection", "MaskRCNN", mmdetection),
    "detectron2": ("detectron2", "GeneralizedRCNN with FPN and masks", detectron),
}


def sample(size: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels: a bright rectangle on a dark image with noise."""
    height, width = size
    labels = torch.zeros(n, height, width, dtype=torch.long)
    for i, label in enumerate(labels):
        label[height // 4 : height * 3 // 4, width // 4 + 8 * i : width * 2 // 3 + 8 * i] = 1
    noise = torch.randint(0, 80, (n, 3, height, width), generator=torch.Generator().manual_seed(0))
    return (noise + 150 * labels[:, None]).byte(), labels


def build(library: str, backbone: str, folder: Callable[[str], Path]) -> tuple[Decoder, dict[str, Any]]:
    """The decoder and the keywords of its backbone; ``folder`` gives the weights of a checkpoint."""
    keywords = BACKBONES[backbone]
    keywords = {**keywords, "checkpoint_path": str(folder(keywords["name"].partition("_")[0]))}
    torch.manual_seed(0)
    return LIBRARIES[library][2](keywords), keywords


def train(decoder: Decoder, steps: int = STEPS) -> Iterator[float]:
    """The loss before each step, and after the last."""
    pixels, labels = sample(SIZE, 2)
    optimizer = torch.optim.AdamW([p for p in decoder.model.parameters() if p.requires_grad], lr=1e-3)
    decoder.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = decoder.loss(pixels, labels)
        loss.backward()
        optimizer.step()
        yield loss.item()
    yield decoder.loss(pixels, labels).item()


@torch.no_grad()
def infer(decoder: Decoder) -> Tensor:
    """The prediction for an image of an odd size."""
    decoder.model.eval()
    return decoder.predict(sample(ODD, 1)[0])


def row(
    library: str, backbone: str, keywords: Mapping[str, Any], losses: Sequence[float], prediction: Tensor
) -> dict[str, str]:
    """A line of the table."""
    distribution, decoder, _ = LIBRARIES[library]
    strides = original(**keywords).feature_info.reduction()
    return {
        "library": library,
        "version": detectron2.__version__
        if library == "detectron2"
        else version(distribution),  # which may run from a folder
        "decoder": decoder,
        "backbone": backbone,
        "strides": " ".join(map(str, strides)),
        "loss": f"{losses[0]:.2f}",
        f"loss after {STEPS} steps": f"{losses[-1]:.2f}",
        "prediction": " x ".join(map(str, prediction.shape[-2:])),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DIFFUSION_BACKBONES_CACHE"] = scratch
        folder = functools.cache(lambda name: tiny.folder(name, Path(scratch, name)))
        rows = []
        for library, backbone in itertools.product(LIBRARIES, BACKBONES):
            decoder, keywords = build(library, backbone, folder)
            rows.append(row(library, backbone, keywords, list(train(decoder)), infer(decoder)))
            print(*rows[-1].values(), sep=", ", flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
