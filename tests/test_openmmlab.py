"""The registered backbone under real heads of mmsegmentation, and the example configs under mmengine's real runner."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import numpy as np
import pytest
import snippets
import torch
import warm
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from PIL import Image

import diffusion_backbones as db
import diffusion_backbones.integrations.openmmlab

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "openmmlab").glob("*.py"))
PIXELS = dict(
    type="SegDataPreProcessor",
    mean=[127.5] * 3,
    std=[127.5] * 3,
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=(64, 64),
)
BACKBONES = {
    "sd15": dict(name="sd15_gdf"),
    "sdxl": dict(name="sdxl_gdf"),
    "one level": dict(name="sd15", recipe=("up-level1-repeat2-res-out",)),
    "four strides": dict(name="sd15_gdf", out_strides=(4, 8, 16, 32)),
}
HEADS = {
    "UPerHead": lambda c, _: dict(
        decode_head=dict(type="UPerHead", in_channels=c, in_index=list(range(len(c))), pool_scales=(1, 2))
    ),
    "FPNHead": lambda c, s: dict(
        neck=dict(type="FPN", in_channels=c, out_channels=16, num_outs=len(c)),
        decode_head=dict(type="FPNHead", in_channels=[16] * len(c), in_index=list(range(len(c))), feature_strides=s),
    ),
    "SegformerHead": lambda c, _: dict(
        decode_head=dict(type="SegformerHead", in_channels=c, in_index=list(range(len(c))))
    ),
    "FCNHead": lambda c, _: dict(
        decode_head=dict(type="FCNHead", in_channels=c[-1], in_index=-1),
        auxiliary_head=dict(type="FCNHead", in_channels=c[0], in_index=0, num_convs=1, concat_input=False),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def scope():
    register_all_modules(init_default_scope=True)


@pytest.fixture
def backbone(tiny_folder):
    """``backbone("sd15")`` -> the config of one of BACKBONES with tiny weights."""

    def cfg(key, **more):
        folder = tiny_folder(BACKBONES[key]["name"].partition("_")[0])
        return dict(type="DiffusionBackbone", checkpoint_path=str(folder), **BACKBONES[key], **more)

    return cfg


@functools.cache
def described(**keywords):
    return db.create_model(**keywords, device="meta").feature_info


def segmentor(cfg, heads="UPerHead", pixels=PIXELS):
    info = described(**{k: v for k, v in cfg.items() if k != "type"})
    parts = HEADS[heads](info.channels(), info.reduction())
    for head in (part for key, part in parts.items() if key.endswith("head")):
        head |= dict(
            channels=16,
            num_classes=5,
            norm_cfg=dict(type="BN"),
            align_corners=False,
            dropout_ratio=0,
            loss_decode=dict(type="CrossEntropyLoss"),
        )
    torch.manual_seed(0)
    return MODELS.build(
        ConfigDict(
            type="EncoderDecoder",
            data_preprocessor=pixels,
            backbone=cfg,
            train_cfg={},
            test_cfg=dict(mode="whole"),
            **parts,
        )
    )


def batch(height, width):
    """Two BGR images of random squares, and the squares as labels."""
    inputs, samples = [], []
    for i in range(2):
        labels = (
            np.random.default_rng(i)
            .integers(0, 5, (-(-height // 16), -(-width // 16)))
            .repeat(16, 0)
            .repeat(16, 1)[:height, :width]
        )
        inputs.append(torch.from_numpy(np.stack([labels * 50, 255 - labels * 40, labels * 20]).astype(np.uint8)))
        sample = SegDataSample(
            metainfo=dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))
        )
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def loss_of(model, data):
    return model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(data), True), mode="loss"))[0]


@pytest.mark.parametrize("heads", [name for name in HEADS if name != "UPerHead"])  # which test_decoders.py has
@pytest.mark.parametrize("key", BACKBONES)
def test_a_segmentor_trains_and_predicts_at_odd_sizes(backbone, key, heads):
    model = segmentor(backbone(key), heads)
    model.init_weights()
    before = {name: p.clone() for name, p in model.backbone.state_dict().items()}
    model.train()
    loss_of(model, batch(60, 50)).backward()
    assert not model.backbone.net.training
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert trained
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.state_dict().items())

    model.eval()
    data = model.data_preprocessor(batch(71, 93), False)
    assert model(**data, mode="predict")[0].pred_sem_seg.data.shape == (1, 71, 93)


def test_the_registries_of_every_library_find_it():
    """mmseg's and mmdet's registries are children of mmengine's, and ``custom_imports`` is all that a config needs."""
    code = """
from mmengine.config import Config
Config.fromstring('custom_imports = dict(imports=["diffusion_backbones.integrations.openmmlab"])', '.py')
from mmengine.registry import MODELS, Registry
from mmseg.registry import MODELS as MMSEG
cfg = dict(type="DiffusionBackbone", name="tinysd_gdf", device="meta")
print([type(r.build(cfg)).__name__ for r in (MODELS, MMSEG, Registry("model", parent=MODELS, scope="mmdet"))])
"""
    run = warm.run(code)
    assert run.stdout.splitlines()[-1:] == ["['OpenMMLabBackbone', 'OpenMMLabBackbone', 'OpenMMLabBackbone']"], (
        run.stderr[-2000:]
    )


def test_without_mmengine_the_error_says_what_to_install():
    code = "import sys; sys.modules['mmengine'] = None; import diffusion_backbones.integrations.openmmlab"
    run = warm.run(code)
    assert "needs mmengine" in run.stderr
    assert "diffusion-backbones[openmmlab]" in run.stderr


# The keywords.


def test_input_scale_resizes_the_image_alone(backbone):
    x = torch.rand(1, 3, 40, 56) * 2 - 1
    doubled = torch.nn.functional.interpolate(x, (80, 112), mode="bilinear", align_corners=False)
    plain, scaled = MODELS.build(backbone("sd15")), MODELS.build(backbone("sd15", input_scale=2))
    assert all(torch.equal(a, b) for a, b in zip(scaled(x), plain(doubled), strict=True))


def test_a_half_precision_network_gives_maps_for_a_float32_head(backbone):
    model = segmentor(backbone("sd15", dtype="bfloat16"))
    assert model.backbone.net.denoiser.conv_in.weight.dtype == torch.bfloat16
    maps = model.extract_feat(torch.rand(1, 3, 40, 56) * 2 - 1)
    assert {level.dtype for level in maps} == {torch.float32}
    loss_of(model.train(), batch(64, 64)).backward()
    model.eval()(**model.data_preprocessor(batch(40, 56), False), mode="predict")


def test_init_cfg_is_where_the_weights_come_from(backbone):
    cfg = backbone("sd15")
    checkpoint = cfg.pop("checkpoint_path")
    model = MODELS.build(dict(cfg, init_cfg=dict(type="Pretrained", checkpoint=checkpoint)))
    assert model.net.provenance["path"] == checkpoint
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), MODELS.build(backbone("sd15")).parameters(), strict=True)
    )


def test_init_weights_of_a_segmentor_leaves_the_backbone(backbone):
    model = segmentor(backbone("sdxl"))
    before = copy.deepcopy(model.backbone.state_dict())
    model.init_weights()
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.state_dict().items())


def test_a_trainable_backbone_is_trained(backbone):
    model = segmentor(backbone("sd15", trainable=True)).train()
    assert model.backbone.net.training
    loss_of(model, batch(64, 64)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.backbone.parameters())
    assert any(p.requires_grad for p in model.backbone.parameters())


def test_out_indices_choose_levels(backbone):
    net = MODELS.build(backbone("sd15", out_indices=(0, 2))).net
    assert net.feature_info.reduction() == [8, 32]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(in_channels=4), ValueError, "takes RGB, so in_chans must be 3, got 4"),
        (dict(out_indices=(0, 1, 2, 3)), ValueError, r"from -3 to 2, got \[0, 1, 2, 3\]"),
        (
            dict(out_strides=(32, 16, 8, 4)),
            ValueError,
            r"growing positive integers such as \(4, 8, 16, 32\), got \(32, 16, 8, 4\)",
        ),
        (dict(depth=50), TypeError, "no keyword 'depth'"),
        (dict(pretrained="weights.safetensors"), TypeError, "checkpoint_path='weights.safetensors'"),
        (dict(init_cfg=dict(type="Kaiming")), ValueError, "init_cfg must be None.*got {'type': 'Kaiming'}"),
        (
            dict(init_cfg=dict(type="Pretrained", checkpoint="a"), checkpoint_path="b"),
            ValueError,
            "either init_cfg=.*or checkpoint_path='b'",
        ),
        (dict(input_scale=0), ValueError, "positive factor, got 0"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_keywords(given, error, says):
    with pytest.raises(error, match=says):
        MODELS.build(dict(type="DiffusionBackbone", name="tinysd_gdf", device="meta", **given))


def test_another_normalisation_is_noticed(backbone):
    imagenet = PIXELS | dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    model = segmentor(backbone("sd15"), pixels=imagenet).eval()
    with pytest.warns(
        UserWarning, match=r"takes images in \[-1, 1\], and values lie beyond: .*input_format='imagenet'"
    ):
        model(**model.data_preprocessor(batch(40, 56), False), mode="predict")
    model = segmentor(backbone("sd15")).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**model.data_preprocessor(batch(40, 56), False), mode="predict")
    assert not [w for w in caught if "values lie beyond" in str(w.message)]


# The example configs.


def ade20k(root):
    for part, count in (("training", 2), ("validation", 1)):
        for i in range(count):
            yield (
                root / "images" / part / f"ADE_{i:08}.jpg",
                root / "annotations" / part / f"ADE_{i:08}.png",
                (96, 128),
                151,
            )


def cityscapes(root):
    for part, count in (("train", 2), ("val", 1)):
        for i in range(count):
            name = f"aachen_{i:06}_000019"
            yield (
                root / f"leftImg8bit/{part}/aachen/{name}_leftImg8bit.png",
                root / f"gtFine/{part}/aachen/{name}_gtFine_labelTrainIds.png",
                (64, 128),
                19,
            )


def write(layout, root):
    """Images of random squares whose labels are written as that data set's are."""
    for i, (image, labels, (height, width), classes) in enumerate(layout(root)):
        squares = (
            np.random.default_rng(i)
            .integers(0, classes, (height // 16, width // 16), dtype=np.uint8)
            .repeat(16, 0)
            .repeat(16, 1)
        )
        for path, pixels in ((image, np.stack([squares, 255 - squares, squares], -1)), (labels, squares)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def shrink(node, factor):
    """Every size in pixels of a pipeline, divided."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in ("crop_size", "scale", "size", "stride") and isinstance(value, (tuple, list)):
                node[key] = tuple(v // factor for v in value)
            else:
                shrink(value, factor)


def test_there_are_configs():
    assert [path.stem for path in CONFIGS] == [
        f"{data}_{model}_gdf_upernet" for data in ("ade20k", "cityscapes") for model in ("sd15", "sdxl")
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_fits_its_backbone(path):
    cfg = Config.fromfile(path).model
    net = db.create_model(cfg.backbone.name, device="meta")
    channels, strides = net.feature_info.channels(), net.feature_info.reduction()
    assert [channels[i] for i in cfg.decode_head.in_index] == cfg.decode_head.in_channels == channels
    assert (channels[cfg.auxiliary_head.in_index], strides[cfg.auxiliary_head.in_index]) == (
        cfg.auxiliary_head.in_channels,
        16,
    )
    native = db.get_pretrained_cfg(cfg.backbone.name)["input_size"][1]
    assert cfg.test_cfg.crop_size[0] * cfg.backbone.get("input_scale", 1) == native


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_trains(path, tiny_folder, tmp_path):
    """In float32, since float16 is slow on a CPU; without yapf, which formats the config seven times in a run."""
    cfg = Config(Config.fromfile(path).to_dict(), filename=str(path), format_python_code=False)
    folder = tiny_folder(cfg.model.backbone.name.partition("_")[0])
    channels = db.create_model(cfg.model.backbone.name, checkpoint_path=folder).feature_info.channels()
    auxiliary = channels[cfg.model.auxiliary_head.in_index]
    shrink(cfg.model, 16)
    small = dict(
        backbone=dict(checkpoint_path=str(folder), dtype="float32"),
        decode_head=dict(in_channels=channels, channels=16),
        auxiliary_head=dict(in_channels=auxiliary, channels=16),
    )
    cfg.merge_from_dict(
        dict(
            model=small,
            train_cfg=dict(max_iters=1, val_interval=1),
            default_hooks=dict(logger=dict(interval=1)),
            work_dir=str(tmp_path / "work"),
            experiment_name=f"{path.stem}_{tmp_path.name}",
        )
    )
    write(ade20k if "ade20k" in path.stem else cityscapes, tmp_path / "data")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        shrink(loader, 16)
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(tmp_path / "data")
    try:
        runner = Runner.from_cfg(cfg)
        assert (len(runner.train_dataloader.dataset), len(runner.val_dataloader.dataset)) == (2, 1)
        head = runner.model.decode_head
        before = head.fpn_bottleneck.conv.weight.clone()
        runner.train()
    finally:
        DefaultScope._instance_dict.clear()
        register_all_modules(init_default_scope=True)
    scalars = runner.message_hub.log_scalars
    assert all(
        np.isfinite(scalars[f"train/{name}"].current())
        for name in ("decode.loss_ce", "decode.loss_lovasz", "aux.loss_ce")
    )
    assert 0 <= scalars["val/mIoU"].current() <= 100
    assert not torch.equal(head.fpn_bottleneck.conv.weight, before)
    assert (tmp_path / "work" / "iter_1.pth").is_file()


def test_the_page_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in snippets.blocks((ROOT / "docs" / "decoders" / "openmmlab.md").read_text()):
        assert snippets.printed(block, names) == snippets.promised(block)
