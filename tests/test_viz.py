"""PCA pictures: what the colours mean, and that everything in a picture is where it belongs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffusion_backbones import get_declaration, list_models
from diffusion_backbones.evaluation import visualize
from diffusion_backbones.evaluation.visualize import Panel, pca_rgb, picture


def test_components_of_known_features():
    """Three independent maps, mixed into 16 channels with weights 9 > 3 > 1, come back as red, green and blue."""
    torch.manual_seed(0)
    sources = torch.rand(3, 400) ** 3  # skewed: few positions are bright
    sources = sources - sources.mean(1, keepdim=True)
    mixing, _ = torch.linalg.qr(torch.randn(16, 3))
    rgb = (
        pca_rgb((mixing @ (torch.tensor([[9.0], [3.0], [1.0]]) * sources)).reshape(16, 20, 20) + 5)
        .float()
        .reshape(400, 3)
        .T
    )
    correlation = torch.corrcoef(torch.cat([sources, rgb]))[:3, 3:]
    assert correlation.diagonal().min() > 0.9, correlation
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 0.2


def test_sign_does_not_depend_on_the_sign_of_the_features():
    torch.manual_seed(0)
    features = torch.rand(8, 12, 9) ** 4
    assert torch.equal(pca_rgb(features), pca_rgb(-features))


def test_outliers_do_not_take_the_contrast():
    torch.manual_seed(0)
    features = torch.rand(8, 40, 40)
    features[:, 0, 0] = 1e4
    assert pca_rgb(features).float().std() > 40


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4), (16, 1, 1), (2, 1, 9)])
def test_any_shape(shape):
    assert pca_rgb(torch.randn(shape)).shape == (*shape[1:], 3)


def test_constant_features_are_grey():
    assert pca_rgb(torch.ones(4, 3, 3)).unique().tolist() == [128]


def test_positions_lie_over_their_pixels():
    """A 20 x 12 photograph at stride 8 has a grid of 3 x 2 whose last column and row reach beyond it."""
    features = torch.zeros(1, 2, 3)
    features[0, 0, 2] = 1.0
    enlarged = visualize._enlarge(Panel("level 0", features, 8), (20, 12), (200, 120))
    bright = torch.tensor(list(enlarged.getchannel("R").tobytes())).reshape(120, 200) > 200
    expected = torch.zeros(120, 200, dtype=torch.bool)
    expected[:80, 160:] = True
    assert torch.equal(bright, expected)


def test_picture_is_deterministic_and_warns():
    torch.manual_seed(0)
    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    panels = [Panel("level 0", torch.randn(16, 8, 12), 8), Panel("level 1", torch.randn(32, 4, 6), 16)]
    first, second = (picture(photo, panels, "name", "about", warning=visualize.UNTRAINED) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    without = picture(photo, panels, "name", "about")
    assert first.height > without.height
    assert visualize.RED in {colour for _, colour in first.getcolors(2**24)}
    assert visualize.RED not in {colour for _, colour in without.getcolors(2**24)}


@pytest.mark.parametrize("size", [(640, 16), (16, 200), (1, 1)])
def test_extreme_photographs(size):
    out = picture(
        Image.new("RGB", size),
        [Panel("level 0", torch.randn(4, -(-size[1] // 8), -(-size[0] // 8)), 8)],
        "a_long_name_of_a_backbone",
        "about",
    )
    assert out.width < 5000


@pytest.mark.parametrize("name", list_models())
def test_the_font_has_every_letter_of_every_title(name):
    for text in visualize.titles(get_declaration(name)):
        assert all(c.isascii() or c == "·" for c in visualize._plain(text)), text


def test_a_picture_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        visualize.write(Image.new("RGB", (4, 4)), tmp_path / "file" / "out.png")
    visualize.write(Image.new("RGB", (4, 4)), tmp_path / "new" / "out.jpg")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jpg"]
