"""torchvision's own detectors and DeepLabV3 on a backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snippets import blocks, printed, promised
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCNHead

import diffusion_backbones as db
from diffusion_backbones.integrations.torchvision import NamedLevels, PyramidFPN

PAGE = Path(__file__).parent.parent / "docs" / "decoders" / "torchvision.md"
SMALL = dict(num_classes=3, min_size=48, max_size=64)
ONE_LEVEL = ["up-level1-repeat2-res-out"]
BACKBONES = {
    "sd15_gdf": ("sd15_gdf", {}),
    "sdxl_gdf": ("sdxl_gdf", {}),
    "one level": ("sd15", {"recipe": ONE_LEVEL}),
    "resampled": ("sd15_gdf", {"out_strides": (4, 8, 16, 32)}),
}


@pytest.fixture(params=BACKBONES)
def backbone(request, tiny_folder):
    name, keywords = BACKBONES[request.param]
    return db.create_model(name, checkpoint_path=tiny_folder(name.split("_")[0]), **keywords)


def sample(height=77, width=101, n=2):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[10.0, 12.0, 60.0, 64.0], [30.0, 20.0, 90.0, 70.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int(), strict=True):
        mask[top:bottom, left:right] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in range(n)]
    return [torch.rand(3, height, width, generator=generator) for _ in range(n)], targets


def detector(kind, backbone, out_channels=64):
    fpn = PyramidFPN(backbone, out_channels, extra="pool" if kind is FasterRCNN else "p6p7")
    if kind is RetinaNet:
        return kind(fpn, anchor_generator=fpn.anchors(4, octaves=3), **SMALL, **fpn.transform)
    if kind is FCOS:
        return kind(fpn, anchor_generator=fpn.anchors(1, ratios=(1.0,)), **SMALL, **fpn.transform)
    parts = {"rpn_anchor_generator": fpn.anchors(), "box_roi_pool": fpn.roi_align(7)}
    return kind(
        fpn,
        **parts,
        **SMALL,
        **fpn.transform,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=5,
    )


def check_frozen(backbone):
    assert not backbone.training
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet, FCOS])
def test_detectors_train_and_detect(kind, tiny_folder):
    torch.manual_seed(0)
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    model = detector(kind, backbone)
    images, targets = sample()
    loss = sum(model.train()(images, targets).values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.backbone.fpn.inner_blocks.parameters())
    check_frozen(backbone)
    found = model.eval()([torch.rand(3, 61, 83)])[0]
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_deeplab_trains_and_segments(backbone):
    body = NamedLevels(backbone, out=-1, aux=0)
    model = DeepLabV3(body, DeepLabHead(body.channels["out"], 5), FCNHead(body.channels["aux"], 5))
    out = model.train()(torch.rand(2, 3, 60, 91) * 2 - 1)
    assert {name: logits.shape for name, logits in out.items()} == dict.fromkeys(("out", "aux"), (2, 5, 60, 91))
    sum(
        torch.nn.functional.cross_entropy(logits, torch.zeros(2, 60, 91, dtype=torch.long)) for logits in out.values()
    ).backward()
    check_frozen(backbone)
    assert model.eval()(torch.rand(1, 3, 61, 83) * 2 - 1)["out"].shape == (1, 5, 61, 83)


def test_a_detector_pads_and_normalises_as_the_backbone_wants(tiny_folder):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    fpn = PyramidFPN(backbone, 16)
    model = FasterRCNN(
        fpn,
        **SMALL,
        rpn_anchor_generator=fpn.anchors(),
        box_roi_pool=fpn.roi_align(7),
        _skip_resize=True,
        **fpn.transform,
    )
    images, _ = sample(n=1)
    seen = model.transform(images)[0].tensors
    assert all(s % fpn.transform["size_divisible"] == 0 for s in seen.shape[-2:])
    pixels = torch.stack(images) * 2 - 1
    assert torch.equal(seen[..., :77, :101], pixels)
    assert all(torch.equal(a, b) for a, b in zip(fpn.body(seen).values(), backbone(seen), strict=True))


def test_anchors_lie_where_the_maps_do(tiny_folder):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    for extra, strides, divisible in (
        ("pool", [8, 16, 32, 64], 64),
        ("p6p7", [8, 16, 32, 64, 128], 128),
        (None, [8, 16, 32], 64),
    ):
        fpn = PyramidFPN(backbone, 8, extra=extra)
        assert (fpn.strides, fpn.transform["size_divisible"]) == (strides, divisible)
        maps = fpn(torch.zeros(1, 3, divisible, 2 * divisible))
        assert list(maps) == fpn.names
        assert [tuple(m.shape[1:]) for m in maps.values()] == [(8, divisible // s, 2 * divisible // s) for s in strides]


def test_the_default_anchors_fit_the_strides_that_the_page_names(tiny_folder):
    images, targets = sample(n=1)
    for kind, strides, extra in (
        (FasterRCNN, (4, 8, 16, 32), "pool"),
        (RetinaNet, (8, 16, 32), "p6p7"),
        (FCOS, (8, 16, 32), "p6p7"),
    ):
        fpn = PyramidFPN(
            db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), out_strides=strides), 64, extra=extra
        )
        default = kind(fpn, **SMALL, **fpn.transform)
        torch.manual_seed(0)
        assert sum(default.train()(images, targets).values()).isfinite()
        made = detector(kind, fpn.body.backbone)
        ours, theirs = (m.rpn.anchor_generator if kind is FasterRCNN else m.anchor_generator for m in (made, default))
        assert [a.shape for a in ours.cell_anchors] == [a.shape for a in theirs.cell_anchors]
        assert all(
            (a - b).abs().max() <= 2 for a, b in zip(ours.cell_anchors, theirs.cell_anchors, strict=True)
        )  # theirs are truncated to integers


def test_levels_can_be_chosen(tiny_folder):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    fpn = PyramidFPN(backbone, 8, levels=[-2, -1])
    assert (fpn.names, fpn.strides, fpn.roi_names) == (["0", "1", "pool"], [16, 32, 64], ["0", "1"])
    assert list(fpn.body.channels.values()) == backbone.feature_info.channels()[1:]
    x = torch.rand(1, 3, 50, 70) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(fpn.body(x).values(), backbone(x)[1:], strict=True))


def test_a_detector_without_our_normalisation_is_an_error(tiny_folder):
    fpn = PyramidFPN(db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), out_strides=(4, 8, 16, 32)), 8)
    model = FasterRCNN(fpn, **SMALL).eval()
    with pytest.raises(ValueError, match=r"takes images in \[-1, 1\], got values in \[-.*PyramidFPN.transform"):
        model(sample()[0])


def test_bad_levels_are_refused(tiny_folder):
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    with pytest.raises(
        ValueError, match=r"aux=3 is not a level: sd15_gdf has 0: 16 channels at stride 8, .*out_strides"
    ):
        NamedLevels(backbone, out=-1, aux=3)
    with pytest.raises(ValueError, match="different positions from -3 to 2"):
        PyramidFPN(backbone, levels=[0, 3])
    with pytest.raises(ValueError, match="'pool', 'p6p7' or None, got 'p6'"):
        PyramidFPN(backbone, extra="p6")
    with pytest.raises(
        ValueError, match=r"strides of an FPN's levels must grow, got \[16, 8\] from levels=\[1, 0\].*choose"
    ):
        PyramidFPN(backbone, levels=[1, 0])
    double = db.create_model(
        "sd15",
        checkpoint_path=tiny_folder("sd15"),
        recipe=db.Recipe("two", levels=(("up-level2-repeat2-res-out",), ONE_LEVEL)),
    )
    assert PyramidFPN(double, 8, levels=[0]).strides == [
        double.feature_info.reduction()[0],
        2 * double.feature_info.reduction()[0],
    ]
    with pytest.raises(ValueError, match="in_chans must be 3"):
        db.create_model("sd15_gdf", in_chans=4)


def test_the_page_prints_what_it_says():
    names = {}
    for block in blocks(PAGE.read_text()):
        assert printed(block, names) == promised(block) != []
