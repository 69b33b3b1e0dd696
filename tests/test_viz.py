"""PCA pictures: what the colours mean, and that everything in a picture is where it belongs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_backbones import get_declaration, list_models
from diffusion_backbones.evaluation import pca_rgb, shared_rgb, sheet, visualize
from diffusion_backbones.evaluation.principal_components import otsu
from diffusion_backbones.evaluation.visualize import Panel, picture

ROOT = Path(__file__).parents[1]


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


def test_colors_of_several_maps_are_those_of_their_common_components():
    """Against numpy's singular value decomposition of all positions together."""
    rng = np.random.default_rng(0)
    maps = [rng.gamma(1, size=(6, *size)) * np.array([9, 5, 3, 1, 1, 1])[:, None, None] for size in ((5, 7), (12, 4))]
    x = np.concatenate([m.reshape(6, -1).T for m in maps])
    x = x - x.mean(0)
    expected = x @ np.linalg.svd(x, full_matrices=False)[2][:3].T
    expected *= np.sign((expected**3).sum(0))
    low, high = np.sort(expected, 0)[[0, -1]]  # a hundredth of 83 positions is none
    expected = ((expected - low) / (high - low)).clip(0, 1) * 255
    found = [rgb.numpy() for rgb in shared_rgb([torch.from_numpy(m) for m in maps])]
    assert [rgb.shape for rgb in found] == [(5, 7, 3), (12, 4, 3)]
    assert np.abs(np.concatenate([rgb.reshape(-1, 3) for rgb in found]) - expected).max() <= 1


def test_the_same_thing_has_the_same_color_in_every_map():
    """Also where another map holds other things, which would change a basis of one map alone."""
    torch.manual_seed(0)
    things = torch.randn(5, 16) * 3
    grids = [torch.randint(0, 3, (8, 8)), torch.randint(2, 5, (6, 10))]
    colors = shared_rgb([things[grid].permute(2, 0, 1) for grid in grids])
    of = {i: {tuple(c) for rgb, g in zip(colors, grids, strict=True) for c in rgb[g == i].tolist()} for i in range(5)}
    assert all(len(found) == 1 for found in of.values())
    assert len(set.union(*of.values())) == 5


def test_maps_of_other_channels_have_no_common_basis():
    with pytest.raises(ValueError, match=r"one number of channels, got \[3, 4\]"):
        shared_rgb([torch.rand(3, 2, 2), torch.rand(4, 2, 2)])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("radius", [3, 7])
def test_the_background_is_what_the_borders_hold(sign, radius):
    """A disc of two halves on a noisy ground: small, and larger than the ground; whatever the sign of the features."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    disc = y.square() + x.square() <= radius**2
    features = torch.randn(12, 16, 16) * 0.2
    features[:4] += disc * 6
    features[5] += disc * (x > 0) * 3
    rgb, alone = shared_rgb([features * sign, torch.randn(12, 16, 16) * 0.2 * sign], hide_background=True)
    assert torch.equal((rgb == 255).all(-1), ~disc)
    assert (alone == 255).all(), "an image of nothing but background is white"
    left, right = (rgb[disc & side].float().mean(0) for side in (x < 0, x > 0))
    assert (left - right).abs().max() > 150, "the colors are not those of the object's own components"


def test_maps_without_any_difference_have_no_background():
    assert shared_rgb([torch.ones(4, 3, 3)] * 2, hide_background=True)[1].unique().tolist() == [128]


@pytest.mark.parametrize("seed", range(5))
def test_otsu_leaves_the_least_variance_within(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 1, 40), rng.normal(5, 2, rng.integers(2, 80))]).astype(np.float32)
    within = {}
    for cut in np.sort(values)[:-1]:
        low, high = values[values <= cut].astype(float), values[values > cut].astype(float)
        within[cut] = len(low) * low.var() + len(high) * high.var()
    assert float(otsu(torch.from_numpy(values))) == min(within, key=within.get)


@pytest.mark.parametrize("width", [48, 44])
def test_positions_are_centered_on_their_pixels(width):
    """A ramp stays a straight ramp; a last column that reaches beyond the image is cut, not squeezed."""
    columns = torch.tensor([20 + 30 * i for i in range(6)], dtype=torch.uint8)
    colors = columns[None, :, None].expand(4, 6, 3).contiguous()
    enlarged = np.asarray(visualize._enlarge(colors, 8, (width, 32), (width * 10, 320)), float)[160, :, 0]
    pixels = (np.arange(width * 10) + 0.5) / 80 - 0.5  # in positions
    inner = (pixels > 2) & (pixels < 3.5)
    assert np.abs(enlarged - (20 + 30 * pixels))[inner].max() < 1.5
    steps = np.abs(np.diff(enlarged))
    assert steps.max() < 5, "the enlargement has edges that the level has not"


def test_a_sheet_has_a_column_for_every_image_and_the_clearest_level_first():
    torch.manual_seed(0)
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    levels = {8: torch.randn(2, 5, 8, 8), 16: torch.randn(2, 6, 4, 4), 32: torch.randn(2, 7, 2, 2)}
    panels = [[Panel(f"level {n}", levels[s][i], s) for n, s in enumerate(levels)] for i in range(2)]
    made = sheet(images, panels, "title", "about")
    side = visualize.OF_SEVERAL
    for column in range(2):
        x = visualize.MARGIN + column * (side + visualize.GAP)
        for row, stride in enumerate([None, 16, 8, 32]):
            y = visualize.TOP + visualize.ABOVE + row * (visualize.ABOVE + side + visualize.GAP)
            shown = np.asarray(made.crop((x + 20, y + 20, x + side - 20, y + side - 20)))
            if stride is None:
                assert (shown == ((255, 0, 0), (0, 0, 255))[column]).all()
                continue
            colors = shared_rgb(list(levels[stride]))[column].numpy()
            expected = Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)
            assert np.array_equal(shown, np.asarray(expected)[20:-20, 20:-20]), (row, stride)
    assert made.tobytes() == sheet(images, panels, "title", "about").tobytes()
    assert made.tobytes() != sheet(images, panels, "title", "about", hide_background=True).tobytes()


def test_one_image_lies_beside_its_levels_the_clearest_first():
    torch.manual_seed(0)
    levels = {8: torch.randn(5, 8, 8), 16: torch.randn(6, 4, 4), 32: torch.randn(7, 2, 2)}
    panels = [Panel(f"level {n}", features, stride) for n, (stride, features) in enumerate(levels.items())]
    made, side = picture(Image.new("RGB", (64, 64)), panels, "title", "about"), visualize.HEIGHT
    for column, stride in enumerate([16, 8, 32], 1):
        x = visualize.MARGIN + column * (side + visualize.GAP)
        shown = made.crop((x + 20, visualize.TOP + 20, x + side - 20, visualize.TOP + side - 20))
        expected = Image.fromarray(pca_rgb(levels[stride]).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(shown), np.asarray(expected)[20:-20, 20:-20]), stride


def test_images_of_several_sizes_make_one_sheet():
    sizes = [(64, 64), (128, 64), (32, 96)]
    panels = [[Panel("level 0", torch.randn(4, h // 8, w // 8), 8)] for w, h in sizes]
    made = sheet([Image.new("RGB", size) for size in sizes], panels, "title", "about")
    assert made.width < 2000
    assert made.height < 3000


def test_images_that_do_not_fit_side_by_side_go_on_below():
    images = [Image.new("RGB", (64, 64), (20 * i, 0, 0)) for i in range(11)]
    made = sheet(images, [[Panel("level 0", torch.ones(4, 8, 8), 8)]] * 11, "title", "about")
    side = visualize.OF_SEVERAL
    for i in range(11):
        x = visualize.MARGIN + i % 8 * (side + visualize.GAP)
        y = visualize.TOP + visualize.ABOVE + i // 8 * 2 * (visualize.ABOVE + side + visualize.GAP)
        assert made.getpixel((x + side // 2, y + side // 2)) == (20 * i, 0, 0)


@pytest.mark.parametrize("size", [(16, 4096), (4096, 16)])
def test_towers_and_panoramas_have_text_that_ends(size):
    w, h = size
    made = sheet(
        [Image.new("RGB", size)] * 2, [[Panel("level 0", torch.randn(4, h // 8, w // 8), 8)]] * 2, "t" * 200, ""
    )
    assert made.width >= visualize.NARROWEST


@pytest.mark.parametrize(("name", "most"), [("a.jpg", 65500), ("a.webp", 16383)])
def test_a_format_that_holds_no_picture_of_this_size_is_named(name, most, tmp_path):
    with pytest.raises(ValueError, match=f"2 x {most + 1} pixels, and .* at most {most} a side; choose .png"):
        visualize.write(Image.new("RGB", (2, most + 1)), tmp_path / name)
    visualize.write(Image.new("RGB", (2, most)), tmp_path / name)


def test_a_sheet_of_levels_that_do_not_belong_together_is_refused():
    one, two = Panel("level 0", torch.randn(4, 2, 2), 8), Panel("level 1", torch.randn(4, 1, 1), 16)
    image = Image.new("RGB", (16, 16))
    for images, panels in (
        ([image] * 2, [[one], [one, two]]),
        ([image] * 2, [[one], [two]]),
        ([image], [[one]] * 2),
        ([], []),
    ):
        with pytest.raises(ValueError, match="every image needs panels of the same levels"):
            sheet(images, panels, "title", "about")


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


def test_the_demo_needs_neither_network_nor_compiler(tmp_path):
    """What ``make demo`` runs after the installation, with no socket to connect and no other program to be found."""
    for folder in ("bin", "site", "path"):
        (tmp_path / folder).mkdir()
    program = tmp_path / "bin" / "diffusion-backbones"
    code = "from diffusion_backbones.cli.program import main; main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import socket\n\ndef refuse(*_):\n    raise SystemExit('the demo opens a connection')\n\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    for tool in ("sh", "mkdir"):
        (tmp_path / "path" / tool).symlink_to(shutil.which(tool))
    made = tmp_path / "made" / "demo.png"
    command = [shutil.which("make"), "--silent", "--assume-old=.venv/installed", "demo", f"BIN={tmp_path / 'bin'}"]
    env = {"PATH": str(tmp_path / "path"), "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "HOME": str(tmp_path)}
    threads = {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}
    done = subprocess.run([*command, f"PICTURE={made}"], cwd=ROOT, env=env | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(made)
    assert done.stdout.count("level 0: (") == 6
    with Image.open(made) as image:
        assert np.asarray(image).std() > 20


def test_the_photographs_of_the_demo_are_few_small_and_credited():
    photographs = sorted((ROOT / "docs" / "demo").glob("*.jpg"))
    assert 4 <= len(photographs) <= 6
    assert sum(path.stat().st_size for path in photographs) < 150_000
    credited = (ROOT / "docs" / "demo" / "README.md").read_text()
    assert all(f"`{path.name}`" in credited for path in photographs)
    assert "Copyright (c) 2016, Federico Perazzi" in credited
    assert "CC0" in credited
    here = ["git", "-C", str(ROOT), "ls-files", "docs/demo"]
    tracked = subprocess.run(here, capture_output=True, text=True)
    assert tracked.returncode or len(tracked.stdout.split()) == len(photographs) + 1, "a clone has not all of them"
