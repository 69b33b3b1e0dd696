"""The registered backbone under mmdetection's own RetinaNet, run from its unpacked release."""

from __future__ import annotations

import mmdet_source  # noqa: F401  # before mmdet itself

# isort: split
import mmdet.models  # noqa: F401  # registers them
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

import diffusion_backbones as db
import diffusion_backbones.integrations.openmmlab

BACKBONES = {
    "sd15_gdf": dict(name="sd15_gdf"),
    "sdxl_gdf": dict(name="sdxl_gdf"),
    "one level": dict(name="sd15", recipe=("up-level1-repeat2-res-out",)),
    "four strides": dict(name="sd15_gdf", out_strides=(4, 8, 16, 32)),
}
PIXELS = dict(type="DetDataPreprocessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_size_divisor=32)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def retinanet(backbone, channels, strides):
    strides = [*strides, 2 * strides[-1], 4 * strides[-1]]
    anchors = dict(
        type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=strides
    )
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0)
    sampler, nms = dict(type="PseudoSampler"), dict(type="nms", iou_threshold=0.5)
    head = dict(type="RetinaHead", num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16)
    config = ConfigDict(
        type="RetinaNet",
        data_preprocessor=PIXELS,
        backbone=dict(type="DiffusionBackbone", **backbone),
        neck=dict(type="FPN", in_channels=channels, out_channels=16, num_outs=len(strides), add_extra_convs="on_input"),
        bbox_head=dict(**head, anchor_generator=anchors),
        train_cfg=dict(assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(nms_pre=50, min_bbox_size=0, score_thr=0.0, nms=nms, max_per_img=3),
    )
    return MODELS.build(config)


def batch(*sizes):
    """BGR images of noise, each with one object."""
    inputs, samples = [], []
    for size in sizes:
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
        samples.append(
            DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)))
        )
        samples[-1].gt_instances = InstanceData(bboxes=torch.tensor([[10.0, 10, 60, 50]]), labels=torch.tensor([1]))
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize("kind", BACKBONES)
def test_retinanet_trains_and_detects_at_an_odd_size(kind, tiny_folder):
    keywords = {**BACKBONES[kind], "checkpoint_path": str(tiny_folder(BACKBONES[kind]["name"].partition("_")[0]))}
    plain = db.create_model(**keywords)
    torch.manual_seed(0)
    model = retinanet(keywords, plain.feature_info.channels(), plain.feature_info.reduction())
    model.init_weights()
    model.train()
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch((64, 96), (70, 90)), True), mode="loss"))
    loss.backward()
    assert loss.isfinite()
    assert not model.backbone.net.training
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    added = {name: p.grad for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert [name for name, grad in added.items() if grad is None or not grad.isfinite().all()] == [], (
        "the step does not reach them"
    )

    data = batch((101, 133))
    found = model.eval()(**model.data_preprocessor(data, False), mode="predict")[0].pred_instances
    assert found.bboxes.shape == (3, 4)
    x = model.data_preprocessor(data, False)["inputs"]
    torch.testing.assert_close(x[..., :101, :133], data["inputs"][0].flip(0)[None] / 127.5 - 1, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone(x), plain(x), strict=True))
