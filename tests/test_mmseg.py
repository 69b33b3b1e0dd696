"""mmsegmentation, the real one, takes a backbone through its own ``TIMMBackbone``; no code of ours stands between."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

import diffusion_backbones as db


def batch(height, width):
    images = [torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3, height, width), dtype=np.uint8)) for i in range(2)]
    size = (height, width)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.zeros(1, height, width, dtype=torch.long)), metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size)
    )
    return dict(inputs=images, data_samples=[sample] * 2)


def test_upernet_on_timm_backbone_trains_and_predicts():
    register_all_modules(init_default_scope=True)
    backbone = dict(type="TIMMBackbone", model_name="tinysd_gdf", features_only=True, pretrained=True, out_indices=(0, 1, 2))
    head = dict(type="UPerHead", in_channels=[48, 96, 224], in_index=[0, 1, 2], channels=16, num_classes=5, norm_cfg=dict(type="BN"))
    head |= dict(align_corners=False, loss_decode=dict(type="CrossEntropyLoss"))
    pixels = dict(type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=(64, 64))
    model = MODELS.build(
        ConfigDict(type="EncoderDecoder", data_preprocessor=pixels, backbone=backbone, decode_head=head, train_cfg={}, test_cfg=dict(mode="whole"))
    )
    features = model.backbone.timm_model
    assert isinstance(features, db.DiffusionBackbone)

    model.train()
    data = model.data_preprocessor(batch(60, 50), True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert not features.training
    assert all(p.grad is None for p in features.parameters())
    assert all(p.grad is not None for p in model.decode_head.parameters())

    model.eval()
    data = model.data_preprocessor(batch(101, 133), False)
    native = db.create_model("tinysd_gdf", pretrained=True)(data["inputs"])
    assert all(torch.equal(a, b) for a, b in zip(model.extract_feat(data["inputs"]), native, strict=True))
    assert model(**data, mode="predict")[0].pred_sem_seg.data.shape == (1, 101, 133)
