"""detectron2, the real one: FPN and no FPN under its detectors and segmentors, from both kinds of configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import detectron2_source  # noqa: F401  # before detectron2 itself

# isort: split
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import FPN, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from snippets import blocks, printed, promised

import diffusion_backbones as db
from diffusion_backbones.integrations.detectron2 import Detectron2Backbone, add_diffusion_config
from diffusion_backbones.ops.pixel_values import to_symmetric

PAGE = Path(__file__).parent.parent / "docs" / "decoders" / "detectron2.md"
VITDET = importlib.util.find_spec("detectron2.modeling.backbone.vit") is not None
BACKBONES = {
    "sd15_gdf": ("sd15", {"NAME": "sd15_gdf"}, [8, 16, 32]),
    "sdxl_gdf": ("sdxl", {"NAME": "sdxl_gdf"}, [16, 32]),
    "one level": ("sd15", {"NAME": "sd15", "RECIPE": ["up-level1-upsampler-out"]}, [16]),
    "four strides": ("sd15", {"NAME": "sd15_gdf", "OUT_STRIDES": (4, 8, 16, 32)}, [4, 8, 16, 32]),
}
FPN_BUILDERS = {
    "RetinaNet": "build_retinanet_diffusion_fpn_backbone",
    "GeneralizedRCNN": "build_diffusion_fpn_backbone",
}


@pytest.fixture
def config(tiny_folder):
    """``config(meta architecture, backbone)`` -> a small model's configuration; ``fpn=False`` puts the heads on the
    backbone itself.
    """

    def get(meta, which="sd15_gdf", fpn=True):
        checkpoint, keys, strides = BACKBONES[which]
        cfg = get_cfg()
        add_diffusion_config(cfg)
        cfg.MODEL.DIFFUSION.update(keys, CHECKPOINT_PATH=str(tiny_folder(checkpoint)))
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.META_ARCHITECTURE = "cpu", "", meta
        cfg.MODEL.BACKBONE.NAME = (
            FPN_BUILDERS.get(meta, "build_diffusion_fpn_backbone") if fpn else "build_diffusion_backbone"
        )
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        names = [f"p{int(np.log2(s))}" if fpn else f"s{s}" for s in strides]
        extra = 2 if meta == "RetinaNet" else 1
        levels = [*names, *(f"p{int(np.log2(strides[-1])) + i}" for i in range(1, extra + 1))] if fpn else names
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32 * 2**i] for i in range(len(levels))]
        cfg.MODEL.RETINANET.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES = levels
        cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = names
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
        cfg.MODEL.RETINANET.NUM_CONVS = 1
        cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = (
            True,
            "StandardROIHeads",
            0.0,
        )
        box, mask, seg = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.SEM_SEG_HEAD
        box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 1, 16, 7
        mask.NAME, mask.NUM_CONV, mask.CONV_DIM, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 1, 8, 14
        seg.CONVS_DIM, seg.COMMON_STRIDE, seg.NORM = 8, 4, ""
        cfg.TEST.DETECTIONS_PER_IMAGE = 3
        return cfg

    return get


def pixels(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def sample(height, width, seed=0):
    """What detectron2's data loader gives: an image with one object on it."""
    objects = Instances((height, width))
    objects.gt_boxes, objects.gt_classes = Boxes(torch.tensor([[10.0, 10, 60, 50]])), torch.tensor([1])
    objects.gt_masks = BitMasks(
        torch.zeros(1, height, width, dtype=torch.bool).index_fill(1, torch.arange(10, 50), True)
    )
    classes = torch.zeros(height, width, dtype=torch.long).index_fill(0, torch.arange(height // 2), 1)
    return {
        "image": pixels(height, width, seed),
        "height": height,
        "width": width,
        "instances": objects,
        "sem_seg": classes,
    }


def network(model):
    return next(m for m in model.modules() if isinstance(m, Detectron2Backbone)).net


def check_step_and_inference(model):
    """One training step on images of two sizes reaches the heads alone; then a prediction at an odd size."""
    with EventStorage(0):
        sum(model.train()([sample(64, 96), sample(70, 90, 1)]).values()).backward()
    net = network(model)
    frozen = {id(p) for p in net.parameters()}
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if id(p) not in frozen)
    with torch.no_grad():
        out = model.eval()([sample(101, 133)])[0]
    if "sem_seg" in out:
        assert out["sem_seg"].shape == (5, 101, 133)
    if "instances" in out:
        assert out["instances"].image_size == (101, 133)
    return out


@pytest.mark.parametrize("which", BACKBONES)
@pytest.mark.parametrize("meta", ["RetinaNet", "SemanticSegmentor"])  # test_decoders.py has R-CNN
def test_fpn(meta, which, config):
    model = build_model(config(meta, which))
    assert model.backbone.size_divisibility == BACKBONES[which][2][-1]
    check_step_and_inference(model)


@pytest.mark.parametrize("meta", ["GeneralizedRCNN", "SemanticSegmentor"])
def test_without_fpn(meta, config):
    """Heads on the maps themselves; detectron2 then pads to what the backbone asks for."""
    cfg = config(meta, "one level" if meta == "GeneralizedRCNN" else "sd15_gdf", fpn=False)
    model = build_model(cfg)
    assert (model.backbone.size_divisibility, model.backbone.padding_constraints) == (64, {"size_divisibility": 64})
    check_step_and_inference(model)


def test_panoptic_fpn(config):
    out = check_step_and_inference(build_model(config("PanopticFPN", "four strides")))
    assert out["panoptic_seg"][0].shape == (101, 133)


def test_names_channels_and_strides(config):
    backbone = build_model(config("SemanticSegmentor", fpn=False)).backbone
    maps = backbone(torch.rand(2, 3, 70, 90) * 2 - 1)
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        "s8": (16, 8),
        "s16": (32, 16),
        "s32": (128, 32),
    }
    assert {n: tuple(m.shape) for n, m in maps.items()} == {
        "s8": (2, 16, 9, 12),
        "s16": (2, 32, 5, 6),
        "s32": (2, 128, 3, 3),
    }


@pytest.mark.parametrize("which", ["sd15_gdf", "sdxl_gdf"])
def test_features_are_those_of_the_backbone(which, config, tiny_folder):
    """FPN pads to 32 only, which is not a multiple of the network's 64: it pads the rest itself."""
    model = build_model(config("RetinaNet", which))
    image = pixels(96, 160)
    x = model.preprocess_image([{"image": image}]).tensor
    assert x.shape == (1, 3, 96, 160)
    maps = model.backbone.bottom_up(x)
    expected = db.create_model(which, checkpoint_path=tiny_folder(BACKBONES[which][0]))((image[None] - 127.5) / 127.5)
    assert all(torch.equal(a, b) for a, b in zip(maps.values(), expected, strict=True))
    d = network(model).size_divisibility
    padded = model.backbone.bottom_up(F.pad(x, (0, -160 % d, 0, -96 % d)))
    assert all(torch.equal(padded[n][..., : m.shape[-2], : m.shape[-1]], m) for n, m in maps.items())


@pytest.mark.parametrize("std", [[1.0] * 3, [57.375, 57.12, 58.395]])
def test_what_detectron2_feeds_by_default_is_undone(std, config, tiny_folder):
    cfg = config("RetinaNet")
    defaults = get_cfg()
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = defaults.INPUT.FORMAT, defaults.MODEL.PIXEL_MEAN, std
    model, image = build_model(cfg), pixels(96, 160)
    assert (cfg.INPUT.FORMAT, network(model).input_format.bgr) == ("BGR", True)
    x = model.preprocess_image([{"image": image.flip(0)}]).tensor
    plain = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    expected = (image[None] - 127.5) / 127.5
    torch.testing.assert_close(to_symmetric(x, network(model).input_format), expected, rtol=0, atol=1e-6)
    for a, b in zip(model.backbone.bottom_up(x).values(), plain(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if std[0] == 1:
        told = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), input_format="detectron2-bgr")(x)
        assert all(torch.equal(a, b) for a, b in zip(model.backbone.bottom_up(x).values(), told, strict=True))


def test_lazy_config(tiny_folder, tmp_path):
    bottom_up = L(Detectron2Backbone)(
        name="sd15_gdf", checkpoint_path=str(tiny_folder("sd15")), out_strides=[8, 16, 32]
    )
    top = L(LastLevelP6P7)(in_channels=128, out_channels="${..out_channels}", in_feature="s32")
    cfg = L(FPN)(bottom_up=bottom_up, in_features=["s8", "s16", "s32"], out_channels=8, top_block=top)
    LazyConfig.save(cfg, str(tmp_path / "fpn.yaml"))
    cfg = LazyConfig.apply_overrides(
        LazyConfig.load(str(tmp_path / "fpn.yaml")), ["out_channels=12", "bottom_up.pixel_std=[1,1,1]"]
    )
    fpn = instantiate(cfg)
    maps = fpn(torch.zeros(1, 3, 64, 96))
    assert {n: tuple(m.shape[1:]) for n, m in maps.items()} == {
        "p3": (12, 8, 12),
        "p4": (12, 4, 6),
        "p5": (12, 2, 3),
        "p6": (12, 1, 2),
        "p7": (12, 1, 1),
    }
    assert network(fpn).input_format.std == (1 / 255,) * 3
    own = instantiate(
        L(Detectron2Backbone)(name="sd15", checkpoint_path=str(tiny_folder("sd15")), recipe=["up-level1-upsampler-out"])
    )
    assert list(own.output_shape()) == ["s16"]


@pytest.mark.skipif(
    not VITDET, reason="detectron2 has no ViTDet up to release 0.6; it has where it was built from its repository"
)
def test_simple_feature_pyramid_under_mask_rcnn(tiny_folder, config):
    """ViTDet's pyramid makes p2 to p6 of the one map at stride 16, in the place of FPN on four strides."""
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

    model = build_model(config("GeneralizedRCNN", "four strides"))
    net = Detectron2Backbone("sd15", checkpoint_path=tiny_folder("sd15"), recipe=["up-level1-upsampler-out"])
    model.backbone = SimpleFeaturePyramid(net, "s16", 8, [4.0, 2.0, 1.0, 0.5], top_block=LastLevelMaxPool())
    check_step_and_inference(model)


def test_a_network_in_half_precision_under_heads_in_float32(config):
    cfg = config("SemanticSegmentor")
    cfg.MODEL.DIFFUSION.DTYPE = "bfloat16"
    model = build_model(cfg)
    assert {p.dtype for p in network(model).denoiser.parameters()} == {torch.bfloat16}
    check_step_and_inference(model)


def test_a_trainable_network_gets_gradients(config):
    cfg = config("SemanticSegmentor")
    cfg.MODEL.DIFFUSION.TRAINABLE = True
    model = build_model(cfg).train()
    sum(model([sample(64, 96)]).values()).backward()
    assert all(p.grad is not None for p in network(model).denoiser.parameters() if p.requires_grad)


# What is refused.


def test_strides_that_fpn_cannot_take(config):
    cfg = config("RetinaNet")
    cfg.MODEL.DIFFUSION.OUT_INDICES = [0, 2]
    with pytest.raises(
        ValueError,
        match=r"powers of two and double .* sd15_gdf has \[8, 32\]; set OUT_STRIDES \(out_strides\) to \[8, 16, "
        r"32\]",
    ):
        build_model(cfg)
    cfg.MODEL.DIFFUSION.OUT_INDICES, cfg.MODEL.DIFFUSION.OUT_STRIDES = None, [6, 12, 24]
    with pytest.raises(
        ValueError, match=r"sd15_gdf has \[6, 12, 24\]; set OUT_STRIDES \(out_strides\) to \[4, 8, 16\]"
    ):
        build_model(cfg)


def test_two_levels_of_one_stride():
    message = (
        r"tinysd_genpercept has strides \[8, 8, 16, 32\]; set OUT_STRIDES \(out_strides\) to \[8, 16, 32\], or "
        r"choose levels with OUT_INDICES"
    )
    with pytest.raises(ValueError, match=message):
        Detectron2Backbone("tinysd_genpercept", device="meta")
    assert list(Detectron2Backbone("tinysd_genpercept", device="meta", out_strides=[8, 16, 32]).output_shape()) == [
        "s8",
        "s16",
        "s32",
    ]


def test_levels_that_the_recipe_lacks(config):
    cfg = config("RetinaNet", "sdxl_gdf")
    cfg.MODEL.FPN.IN_FEATURES = ["s8", "s16", "s32"]
    with pytest.raises(
        ValueError,
        match=r"sdxl_gdf returns s16, s32, and MODEL.FPN.IN_FEATURES names s8; leave it empty or set OUT_STRIDES",
    ):
        build_model(cfg)


def test_images_with_another_normalisation_are_refused():
    backbone = Detectron2Backbone("tinysd_gdf", pretrained=True)
    default = pixels(64, 64).flip(0)[None] - torch.tensor(get_cfg().MODEL.PIXEL_MEAN)[:, None, None]
    message = (
        r"expects RGB in \[-1, 1\], and the images reach from -1.* to 15.*INPUT.FORMAT, MODEL.PIXEL_MEAN and "
        r"MODEL.PIXEL_STD"
    )
    with pytest.raises(ValueError, match=message):
        backbone(default)
    with pytest.raises(ValueError, match="NaN"):
        backbone(default * torch.nan)


@pytest.mark.parametrize("wrong", [{"input_format": "L"}, {"pixel_mean": [127.5]}, {"pixel_std": [1.0] * 4}])
def test_images_without_three_channels(wrong):
    with pytest.raises(
        ValueError,
        match=r"three channels, so INPUT.FORMAT must be 'RGB' or 'BGR', and MODEL.PIXEL_MEAN and MODEL.PIXEL_STD "
        r"three numbers",
    ):
        Detectron2Backbone("tinysd_gdf", device="meta", **wrong)


def test_misspelt_keys(config):
    with pytest.raises((KeyError, AssertionError), match="OUT_STRIDE"):
        config("RetinaNet").merge_from_list(["MODEL.DIFFUSION.OUT_STRIDE", "[8]"])
    with pytest.raises(TypeError, match=r"no keyword 'timestap'.*timestep"):
        Detectron2Backbone("tinysd_gdf", timestap=3)


def test_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import diffusion_backbones.integrations.detectron2"
    run = warm.run(code)
    assert (
        "pip install 'diffusion-backbones[detectron2]' && pip install --no-build-isolation git+https://github.com/"
        in run.stderr.splitlines()[-1]
    )


def test_the_page():
    names = {}
    for block in blocks(PAGE.read_text()):
        assert promised(block)
        assert printed(block, names) == promised(block)
