"""Images as frameworks hand them over: each format gives the features of the same pixels; a wrong one is noticed."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize

import diffusion_backbones as db
from diffusion_backbones.extraction import images
from diffusion_backbones.spec.input_format import FORMATS

pytestmark = pytest.mark.usefixtures("costs_not_measured")

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def handed_over(pixels: torch.Tensor, name: str) -> torch.Tensor:
    """(B, 3, H, W) uint8 as a framework of that kind gives them; written here without the package."""
    unit = pixels / 255
    return {
        "symmetric": pixels / 127.5 - 1,
        "unit": unit,
        "uint8": pixels,
        "imagenet": normalize(unit, **IMAGENET),
        "detectron2-bgr": pixels.flip(1).float() - torch.tensor([103.530, 116.280, 123.675])[:, None, None],
    }[name]


@pytest.fixture(scope="module")
def pixels(photo):
    return ((photo[..., :60, :90] + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_features_of_the_same_pixels(name, pixels):
    expected = db.create_model("tinysd_gdf", pretrained=True)(handed_over(pixels, "symmetric"))
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = backbone(handed_over(pixels, name))
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if name in ("symmetric", "uint8"):
        torch.testing.assert_close(
            backbone.encode(handed_over(pixels, name).float()),
            backbone.encode(handed_over(pixels, name)),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("name", FORMATS)
def test_our_own_preprocessing_follows_the_format(name, pixels):
    """What extraction and visualize make of a file is what the backbone takes."""
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format=name)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    x = images.transform(backbone.pretrained_cfg, None, backbone.input_format.bgr)(image)
    torch.testing.assert_close(x, handed_over(pixels, name)[0].float(), rtol=1e-4, atol=1e-4)
    assert backbone.pretrained_cfg["mean"] == FORMATS[name].mean


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("symmetric", "imagenet"),
        ("symmetric", "uint8"),
        ("symmetric", "detectron2-bgr"),
        ("unit", "symmetric"),
        ("imagenet", "uint8"),
        ("unit", "imagenet"),
    ],
)
def test_values_that_cannot_be_are_noticed(expected, given):
    pixels = torch.tensor([0, 255]).to(torch.uint8).repeat(1, 3, 8, 4)
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format=expected)
    with pytest.warns(UserWarning, match=f"values lie beyond: they look like create_model.*input_format='{given}'"):
        backbone(handed_over(pixels, given).float())


def test_values_that_nothing_gives_are_noticed():
    with pytest.warns(
        UserWarning, match=r"takes images in \[-1, 1\], and values lie beyond: no input_format goes so far"
    ):
        db.create_model("tinysd_gdf", pretrained=True)(torch.full((1, 3, 8, 8), 1e4))


def test_resizing_may_overshoot(recwarn):
    db.create_model("tinysd_gdf", pretrained=True)(torch.full((1, 3, 8, 8), 1.15))
    assert not [w for w in recwarn if "values lie beyond" in str(w.message)]


def test_an_unknown_format_is_refused_and_integers_only_where_they_belong():
    with pytest.raises(
        ValueError, match="input_format='rgb' is none of 'symmetric', 'unit', 'uint8', 'imagenet', 'detectron2-bgr'"
    ):
        db.create_model("tinysd_gdf", input_format="rgb")
    with pytest.raises(TypeError, match=r"expected .* in \[0, 1\], got torch.uint8.*input_format='uint8'"):
        db.create_model("tinysd_gdf", input_format="unit")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_saved_backbone_takes_what_it_took(pixels, tmp_path):
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format="detectron2-bgr")
    again = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")
    x = handed_over(pixels, "detectron2-bgr")
    assert again.input_format == backbone.input_format
    assert all(torch.equal(a, b) for a, b in zip(again(x), backbone(x), strict=True))
    assert db.create_model(f"local-dir:{tmp_path}", input_format="unit").input_format == FORMATS["unit"]
