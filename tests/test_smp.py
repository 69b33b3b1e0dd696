"""segmentation_models_pytorch, the real one: every decoder on pyramids of three levels, two, one and four."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from snippets import blocks, printed, promised

import diffusion_backbones as db
from diffusion_backbones.integrations.smp import Encoder, register

pytestmark = pytest.mark.usefixtures("costs_not_measured")

DECODERS = [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"]
KINDS = {
    "three levels": ("sd15_gdf", {}),
    "two levels": ("sdxl_gdf", {}),
    "one level": ("sd21_dift", {"ensemble": 1}),
    "four strides": ("sd15_gdf", {"out_strides": (4, 8, 16, 32)}),
    "stride 64 too": ("sd15_vpd", {}),
}


@pytest.fixture(scope="module")
def build(tiny_folder):
    """``build(kind)`` -> a backbone of the real topology and tiny width, always with the same weights."""

    def get(kind: str, **keywords):
        name, options = KINDS[kind]
        return db.create_model(name, checkpoint_path=tiny_folder(name.split("_")[0]), **{**options, **keywords})

    return get


@pytest.fixture(scope="module")
def frozen(build):
    """``frozen(kind)`` -> the same backbone at every call: it has no state that a test could change."""
    return functools.cache(build)


def images(height=64, width=96, b=2):
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trains(model, backbone, x):
    """One step, after which what smp added has gradients and the backbone, frozen and in eval, has none."""
    masks = model.train()(x)
    assert masks.shape == (len(x), 4, *x.shape[-2:])
    F.cross_entropy(masks, torch.zeros_like(masks[:, 0], dtype=torch.long)).backward()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.encoder.parameters())
    added = [p for part in (model.decoder, model.segmentation_head) for p in part.parameters()]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in added}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in added)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "four strides"]
)  # to which the others are resampled
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_trains_and_predicts(frozen, decoder, kind):
    backbone = frozen(kind)
    model = smp.create_model(decoder, register(backbone), encoder_weights=None, classes=4)
    assert model.encoder.backbone is backbone
    x = images(128, 160) if decoder == "pan" else images()  # PAN pools the coarsest map three times
    trains(model, backbone, x)
    assert model.predict(x[:1]).isfinite().all()


@pytest.mark.parametrize("kind", ["three levels", "two levels", "one level"])
def test_dpt_trains_through_timm(tiny_folder, frozen, kind):
    name, options = KINDS[kind]
    overlay = {"file": str(tiny_folder(name.split("_")[0])), "custom_load": True}
    options = options | {"out_strides": (4, 8, 16, 32), "pretrained_cfg_overlay": overlay}
    model = smp.DPT(f"tu-{name}", encoder_weights=True, decoder_readout="ignore", classes=4, **options)
    x = images()
    trains(model, model.encoder.model, x)
    expected = frozen(kind, out_strides=(4, 8, 16, 32))(x)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(x)[0], expected, strict=True))


def test_a_recipe_with_the_strides_of_smp_goes_through_timm_alone():
    model, x = smp.Unet("tu-tinysd_odise", encoder_weights=True, classes=4), images()
    trains(model, model.encoder.model, x)
    expected = db.create_model("tinysd_odise", pretrained=True)(x)[:4]
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(x)[2:], expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_backbone(frozen, kind):
    """At an odd size: the native levels where it has them, and what out_strides gives elsewhere."""
    x, native = images(70, 101), frozen(kind)
    features = Encoder(native)(x)
    assert features[0] is x
    assert features[1].shape == (2, 0, 35, 51)
    expected = frozen(kind, out_strides=(4, 8, 16, 32))(x)
    assert all(torch.equal(a, b) for a, b in zip(features[2:], expected, strict=True))
    for stride, level in zip(native.feature_info.reduction(), native(x), strict=True):
        if stride <= 32:
            assert torch.equal(features[stride.bit_length() - 1], level)


def test_a_level_at_stride_two_is_offered(build):
    encoder = Encoder(build("three levels", out_strides=(2, 4, 8, 16, 32)))
    assert encoder.out_channels == [3, 16, 16, 16, 32, 128]
    assert encoder(images())[1].shape == (2, 16, 32, 48)


@pytest.mark.parametrize("stride", [8, 16])
def test_an_output_stride_resamples_deeper_levels(frozen, stride):
    """smp passes it to the constructor and to make_dilated; channels stay those of the deep levels."""
    backbone, x = frozen("three levels"), images(64, 128)
    model = smp.DeepLabV3(register(backbone), encoder_weights=None, encoder_output_stride=stride)
    features = model.encoder(x)
    assert (model.encoder.output_stride, model.encoder.out_channels) == (stride, [3, 0, 16, 16, 32, 128])
    assert [f.shape[-1] for f in features] == [128, 64, 32, 16, 128 // min(stride, 16), 128 // stride]
    coarse = F.interpolate(backbone(x)[-1], (64 // stride, 128 // stride), mode="bilinear", align_corners=False)
    assert torch.equal(features[-1], coarse)


@pytest.mark.parametrize(("depth", "channels"), [(2, [3, 0, 16]), (3, [3, 0, 16, 16]), (4, [3, 0, 16, 16, 32])])
def test_encoder_depth(frozen, depth, channels):
    model = smp.Unet(
        register(frozen("three levels")),
        encoder_weights=None,
        encoder_depth=depth,
        decoder_channels=(16, 8, 8, 4)[:depth],
    )
    assert (model.encoder.out_channels, model.encoder.output_stride) == (channels, 2**depth)
    assert model(images()).shape == (2, 1, 64, 96)


def test_a_unet_predicts_at_odd_sizes(frozen):
    model = smp.Unet(register(frozen("three levels")), encoder_weights=None, classes=4)
    for size in ((70, 101), (33, 128)):
        assert model.predict(images(*size)).shape == (2, 4, *size)


def test_a_trainable_backbone_trains(build):
    backbone = build("three levels", trainable=True)
    model = smp.Linknet(register(backbone), encoder_weights=None).train()
    model(images()).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(p.requires_grad for p in backbone.denoiser.parameters())
    assert not any(p.requires_grad for p in backbone.encoder.parameters())


def test_a_half_precision_backbone_serves_a_decoder_of_full_precision(build):
    backbone = build("three levels", dtype=torch.bfloat16)
    model = smp.FPN(register(backbone), encoder_weights=None)
    assert backbone(images())[0].dtype == torch.bfloat16
    assert model(images()).dtype == torch.float32


def test_a_saved_model_comes_back(build, frozen, tmp_path):
    model = smp.UPerNet(register(frozen("two levels")), encoder_weights=None, classes=3).eval()
    model.save_pretrained(tmp_path)
    expected = model(images())
    register(build("two levels"))
    assert torch.equal(smp.from_pretrained(tmp_path).eval()(images()), expected)


def test_a_model_is_exported_whole(frozen):
    model, x = smp.PSPNet(register(frozen("one level")), encoder_weights=None).eval(), images()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_names(frozen):
    one, two = frozen("three levels"), frozen("two levels")
    assert register(one) == "diffusion-sd15_gdf"
    assert register(two, "mine") == "mine"
    assert smp.Linknet("diffusion-sd15_gdf", encoder_weights=None).encoder.backbone is one
    assert smp.Linknet("mine", encoder_weights=None).encoder.backbone is two
    register(one, "mine")
    assert smp.Linknet("mine", encoder_weights=None).encoder.backbone is one


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"in_channels": 4}, "in_channels must be 3, got 4; bring the image to three channels"),
        ({"encoder_depth": 6}, r"encoder_depth counts the strides \(2, 4, 8, 16, 32\) and must be from 2 to 5, got 6"),
        ({"encoder_depth": 1}, "from 2 to 5, got 1"),
    ],
)
def test_what_no_backbone_can_be_is_refused(frozen, keywords, message):
    with pytest.raises(ValueError, match=message):
        smp.PSPNet(register(frozen("three levels")), encoder_weights=None, **keywords)


def test_what_cannot_be_registered_is_refused(frozen):
    with pytest.raises(TypeError, match="takes a backbone from create_model, got 'sd15_gdf'"):
        register("sd15_gdf")
    for name in ("tu-mine", "timm-mine"):
        with pytest.raises(ValueError, match=rf"in timm, got '{name}'; choose another"):
            register(frozen("three levels"), name)


def test_what_smp_itself_refuses(frozen):
    """Facts of the page: these fail in smp, by its own words, and not later."""
    name = register(frozen("three levels"))
    with pytest.raises(KeyError, match="Wrong pretrained weights `imagenet`"):
        smp.Unet(name)
    with pytest.raises(RuntimeError, match=r"divisible by 32"):
        smp.FPN(name, encoder_weights=None)(images(70, 101))
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet("tu-sd15_gdf", encoder_weights=None, out_strides=(4, 8, 16, 32))
    with pytest.raises(ValueError, match="Only Timm encoders"):
        smp.DPT(name, encoder_weights=None)


def test_without_smp_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusion_backbones.integrations.smp")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.encoders", None)
    with pytest.raises(ImportError, match=r"segmentation_models_pytorch.*pip install 'diffusion-backbones\[smp\]'"):
        import diffusion_backbones.integrations.smp  # noqa: F401


def test_the_page_prints_what_it_says():
    names: dict[str, object] = {}
    page = (Path(__file__).parent.parent / "docs" / "decoders" / "smp.md").read_text()
    for block in blocks(page):
        assert printed(block, names) == promised(block)
