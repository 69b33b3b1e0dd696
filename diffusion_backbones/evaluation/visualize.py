"""Pictures of features: the photograph beside each level, whose channels are projected onto three principal components.

A picture is deterministic: the same features give the same pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.extraction import images, stages
from diffusion_backbones.ops import atomic
from diffusion_backbones.ops.pixel_values import to_symmetric
from diffusion_backbones.reports.facts import cite
from diffusion_backbones.reports.settings import timesteps
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fusion import Fusion

UNTRAINED = "untrained weights: the structure of a random network, nothing learned"
PAPER, INK, GREY, RED = (255, 255, 255), (31, 35, 40), (101, 109, 118), (188, 76, 0)
HEIGHT, MARGIN, GAP, RADIUS = 420, 48, 28, 14
NARROWEST, TALLEST = 300, 6 * HEIGHT
"""Least width and most height of a panel in pixels."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PERCENTILE = 0.01
"""Share of positions that saturate at either end of a component, so that a few outliers do not take the contrast."""


@dataclass(frozen=True)
class Panel:
    """One level in a picture.

    Args:
        name: The first line below it.
        features: (C, h, w), finite.
        stride: Pixels of the photograph per position.
    """

    name: str
    features: Tensor
    stride: int

    @property
    def about(self) -> str:
        """The second line below it: channels, stride, and the grid as width x height."""
        c, h, w = self.features.shape
        return f"{c} channels @ stride {self.stride} · {w} x {h}"


def pca_rgb(features: Tensor) -> Tensor:
    """The first three principal components of a map as red, green and blue.

    Args:
        features: (C, h, w), finite.

    Returns:
        (h, w, 3) uint8 on the CPU. Each component is stretched so that one hundredth of the positions saturates at
        either end, and its sign is such that few positions are bright and many dark: then what stands out is bright
        at every level, and the levels look alike. Components that a map lacks are mid-grey.
    """
    c, h, w = features.shape
    x = features.detach().cpu().double().reshape(c, h * w).T
    x = x - x.mean(0)
    wide = c > h * w
    energy, axes = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # of the smaller of the two: the same components
    rgb = torch.full((h * w, 3), 0.5)
    for i in range(min(3, len(energy))):
        if energy[-1 - i] <= 1e-12 * energy[-1]:
            break
        component = (axes[:, -1 - i] if wide else x @ axes[:, -1 - i]).float()
        if component.pow(3).sum() < 0:
            component = -component
        low, high = (component.kthvalue(k).values for k in _tails(h * w))
        rgb[:, i] = ((component - low) / (high - low)).clamp(0, 1) if high > low else 0.5
    return (rgb * 255).round().byte().reshape(h, w, 3)


def _tails(n: int) -> tuple[int, int]:
    """Ranks, from 1 to n, of the lowest and the highest value that does not saturate."""
    return 1 + int(PERCENTILE * n), n - int(PERCENTILE * n)


def panels(
    backbone: Backbone, photo: Image.Image, size: int | None = None, positions: Sequence[int] | None = None
) -> tuple[list[Panel], Image.Image]:
    """Run a backbone on one photograph.

    Args:
        backbone: The backbone, on its device.
        photo: RGB.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps the photograph's own size.
        positions: Numbers in the names of the levels, from 0 by default.

    Returns:
        A panel for each level, fine to coarse, and the photograph as the network saw it.

    Raises:
        ValueError: It does not fit the memory.
    """
    stages.check_fits(backbone, size or (photo.height, photo.width), 1)
    x = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)(photo)
    device = backbone.device
    with torch.inference_mode():
        pyramid = [level[0].float().cpu() for level in backbone(x[None].to(device))]
    seen = to_symmetric(x[None], backbone.input_format)[0].add(1).mul(127.5).round().byte().permute(1, 2, 0)
    strides = backbone.feature_info.reduction()
    out = [
        Panel(f"level {i}", level, stride)
        for i, level, stride in zip(positions or range(len(pyramid)), pyramid, strides, strict=True)
    ]
    return out, Image.fromarray(seen.numpy())


def titles(declaration: Declaration | Fusion) -> tuple[str, str]:
    """Title and subtitle of a backbone's picture."""
    if isinstance(declaration, Fusion):
        return declaration.name, " + ".join(member.backbone.title or member.name for member in declaration.members)
    recipe = declaration.recipe
    chosen = f"recipe {recipe.name}" + (f" of {cite(recipe.paper)}" if recipe.paper else "")
    return declaration.name, f"{declaration.checkpoint.title} · {chosen} · timestep {timesteps(recipe)}"


def picture(photo: Image.Image, panels: Sequence[Panel], title: str, about: str, warning: str = "") -> Image.Image:
    """Lay a photograph and its levels side by side.

    Args:
        photo: The image that the network saw, RGB.
        panels: Fine to coarse.
        title, about: First and second line at the top.
        warning: A conspicuous line at the bottom.

    Returns:
        An RGB image; all panels have the photograph's shape and one height.
    """
    fitting = round(HEIGHT * photo.width / photo.height)
    width = min(max(fitting, NARROWEST), 3 * HEIGHT)  # captions need some, and panoramas get no more
    height = min(max(round(width * photo.height / photo.width), 1), TALLEST)
    shown_width = max(min(round(height * photo.width / photo.height), width), 1)  # of towers, which get no taller
    captions = [
        ("photograph", f"{photo.width} x {photo.height} pixels"),
        *((panel.name, panel.about) for panel in panels),
    ]
    shown = [
        photo.resize((shown_width, height), Image.Resampling.LANCZOS),
        *(_enlarge(panel, photo.size, (shown_width, height)) for panel in panels),
    ]
    top, line = MARGIN + 130, len(shown) * (width + GAP) - GAP
    canvas = Image.new("RGB", (line + 2 * MARGIN, top + height + 118 + 70 * bool(warning) + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (MARGIN, MARGIN - 8), title, _fit(draw, [title], 54, line), INK, bold=True)
    _text(draw, (MARGIN, MARGIN + 62), about, _fit(draw, [about], 32, line), GREY)
    size = _fit(draw, [text for caption in captions for text in caption], 32, width)
    for i, (image, (name, what)) in enumerate(zip(shown, captions, strict=True)):
        x = MARGIN + i * (width + GAP)
        canvas.paste(image, (x, top), _rounded(image.size))
        _text(draw, (x, top + height + 18), name, size, INK, bold=True)
        _text(draw, (x, top + height + 62), what, size, GREY)
    if warning:
        _text(draw, (MARGIN, top + height + 126), warning, _fit(draw, [warning], 34, line), RED, bold=True)
    return canvas


def write(picture: Image.Image, path: Path) -> None:
    """Save a picture atomically; its folder is made if it does not exist.

    Raises:
        OSError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as part:
            picture.save(part, FORMATS[path.suffix.lower()], quality=95)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _enlarge(panel: Panel, photo: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A level as large as the photograph's panel: every position is a rectangle of one colour over its pixels.

    The last row and column may reach beyond the photograph and are cut there.
    """
    small = Image.fromarray(pca_rgb(panel.features).numpy())
    return small.resize(size, Image.Resampling.NEAREST, box=(0, 0, photo[0] / panel.stride, photo[1] / panel.stride))


def _rounded(size: tuple[int, int]) -> Image.Image:
    """A mask with smooth round corners, drawn four times as large because Pillow does not smooth edges."""
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * size[0] - 1, 4 * size[1] - 1), 4 * RADIUS, fill=255)
    return mask.resize(size, Image.Resampling.LANCZOS)


def _fit(draw: ImageDraw.ImageDraw, texts: Sequence[str], size: float, width: int) -> float:
    """The largest font size up to ``size`` at which each text fits ``width`` pixels."""
    while max(draw.textlength(_plain(text), ImageFont.load_default(size=size)) for text in texts) > width:
        size *= 0.96
    return size


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: float,
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    """One line. Pillow's own font has one weight, so bold is a thin outline."""
    draw.text(at, _plain(text), colour, ImageFont.load_default(size=size), stroke_width=1 if bold else 0)


def _plain(text: str) -> str:
    """The text without accents, which Pillow's own font lacks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
