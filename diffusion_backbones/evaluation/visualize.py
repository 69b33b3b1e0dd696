"""Pictures of features: images beside the levels of their pyramids, whose channels become colors.

A level's principal components are those of all images of a picture, so that a color means the same in each of them. A
picture is deterministic: the same features give the same pixels.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.evaluation.principal_components import shared_rgb
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
OF_SEVERAL, COLUMNS = 280, 8
"""Height of a panel where there are several images, and how many lie side by side."""
SMALLEST = 8
"""Font size in pixels below which text is cut off rather than made smaller."""
TOP, ABOVE = MARGIN + 130, 50
"""Pixels above the first panel, and for the caption above a row of panels."""
CLEAREST = 16
"""Stride of the level that comes first: DIFT, which reads one level alone, reads this one, and so do the backbones that
such pictures became known by. A finer one shows edges and texture, a coarser one has few places."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST = {"JPEG": 65500, "WEBP": 16383}
"""Pixels a side that Pillow writes in these formats."""


@dataclass(frozen=True)
class Panel:
    """One level in a picture.

    Args:
        name: The first line below it.
        features: (C, h, w), finite.
        stride: Pixels of the image per position.
    """

    name: str
    features: Tensor
    stride: int

    @property
    def read(self) -> str:
        """Its channels and stride."""
        return f"{len(self.features)} channels @ stride {self.stride}"

    @property
    def about(self) -> str:
        """The second line below it: channels, stride, and the grid as width x height."""
        return f"{self.read} · {self.features.shape[2]} x {self.features.shape[1]}"

    @staticmethod
    def colors(maps: Sequence[Tensor], hide_background: bool = False) -> list[Tensor]:
        """The colors of one level of some images, (C, h, w) -> (h, w, 3) uint8 each."""
        return shared_rgb(maps, hide_background)


def panels(
    backbone: Backbone, image: Image.Image, size: int | None = None, positions: Sequence[int] | None = None
) -> tuple[list[Panel], Image.Image]:
    """Run a backbone on one image.

    Args:
        backbone: The backbone, on its device.
        image: RGB.
        size: Shorter side and central crop in pixels, as timm's transform does; None keeps the image's own size.
        positions: Numbers in the names of the levels, from 0 by default.

    Returns:
        A panel for each level, fine to coarse, and the image as the network saw it.

    Raises:
        ValueError: It does not fit the memory.
    """
    stages.check_fits(backbone, size or (image.height, image.width), 1)
    x = images.transform(backbone.pretrained_cfg, size, backbone.input_format.bgr)(image)
    device = backbone.device
    with torch.inference_mode():
        pyramid = [level[0].float().cpu() for level in backbone(x[None].to(device))]
    strides = backbone.feature_info.reduction()
    out = [
        Panel(f"level {i}", level, stride)
        for i, level, stride in zip(positions or range(len(pyramid)), pyramid, strides, strict=True)
    ]
    return out, seen(x, backbone)


def seen(x: Tensor, backbone: Backbone) -> Image.Image:
    """The image as a network saw it: (3, H, W) in the backbone's input format, before padding."""
    rgb = to_symmetric(x[None], backbone.input_format)[0].add(1).mul(127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(rgb.numpy())


def titles(declaration: Declaration | Fusion) -> tuple[str, str]:
    """Title and subtitle of a backbone's picture."""
    if isinstance(declaration, Fusion):
        return declaration.name, " + ".join(member.backbone.title or member.name for member in declaration.members)
    recipe = declaration.recipe
    chosen = f"recipe {recipe.name}" + (f" of {cite(recipe.paper)}" if recipe.paper else "")
    return declaration.name, f"{declaration.checkpoint.title} · {chosen} · timestep {timesteps(recipe)}"


def picture(
    image: Image.Image,
    panels: Sequence[Panel],
    title: str,
    about: str,
    warning: str = "",
    hide_background: bool = False,
) -> Image.Image:
    """Lay an image and its levels side by side: :func:`sheet` of one image."""
    return sheet([image], [panels], title, about, warning, hide_background)


def sheet(
    images: Sequence[Image.Image],
    panels: Sequence[Sequence[Panel]],
    title: str,
    about: str,
    warning: str = "",
    hide_background: bool = False,
) -> Image.Image:
    """Lay images side by side, eight in a row, and their levels below them, or one image and its levels side by side.

    The clearest level comes first: that of stride 16, or the next to it.

    Args:
        images: Those that the network saw, RGB.
        panels: Of every image, the same levels, fine to coarse. A level has one basis of colors for all images.
        title, about: First and second line at the top.
        warning: A conspicuous line at the bottom.
        hide_background: Leave it white; :func:`~diffusion_backbones.evaluation.shared_rgb` says what it is.

    Returns:
        An RGB image; all panels of an image have its shape and one height.

    Raises:
        ValueError: There is no image, or not every image has the same levels.
    """
    levels = [_level(row) for row in zip(*panels, strict=True)] if len({len(row) for row in panels}) == 1 else []
    if not levels or len(images) != len(panels):
        raise ValueError(
            f"every image needs panels of the same levels, got {len(images)} images and panels of "
            f"{[len(row) for row in panels]} levels"
        )
    levels.sort(key=lambda level: abs(math.log2(level[0].stride / CLEAREST)))  # stable: the finer one on a tie
    colors = [level[0].colors([panel.features for panel in level], hide_background) for level in levels]
    one = len(images) == 1
    cells = [_panel_size(image, HEIGHT, NARROWEST) if one else _panel_size(image, OF_SEVERAL, 1) for image in images]
    rows = [[image.resize(size[1:], Image.Resampling.LANCZOS) for image, size in zip(images, cells, strict=True)]]
    for level, rgb in zip(levels, colors, strict=True):
        of_image = zip(images, level, rgb, cells, strict=True)
        rows.append([_enlarge(c, panel.stride, image.size, size[1:]) for image, panel, c, size in of_image])
    captions = [("image", _of_images(images)), *((level[0].name, _of_panels(level)) for level in levels)]
    if one:
        return _beside([row[0] for row in rows], captions, cells[0][0], (title, about, warning))
    return _below(rows, captions, [width for width, _, _ in cells], (title, about, warning))


def _beside(
    shown: Sequence[Image.Image], captions: Sequence[tuple[str, str]], width: int, texts: tuple[str, str, str]
) -> Image.Image:
    """Panels in a row of cells of one width, each above its caption of two lines."""
    bottom = TOP + shown[0].height
    canvas, draw = _page(len(shown) * (width + GAP) - GAP, bottom + 118, texts)
    size = _fit(draw, [text for caption in captions for text in caption], 32, width)
    for i, (panel, (name, what)) in enumerate(zip(shown, captions, strict=True)):
        x = MARGIN + i * (width + GAP)
        canvas.paste(panel, (x, TOP), _rounded(panel.size))
        _text(draw, (x, bottom + 18), name, size, INK, bold=True)
        _text(draw, (x, bottom + 62), what, size, GREY)
    return canvas


def _below(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[tuple[str, str]],
    widths: Sequence[int],
    texts: tuple[str, str, str],
) -> Image.Image:
    """Rows of panels, each below its caption of one line; the panels of an image are in one column. What does not fit
    side by side goes on below, with the same captions.
    """
    parts = [slice(start, start + COLUMNS) for start in range(0, len(widths), COLUMNS)]
    line = max(NARROWEST, *(sum(widths[part]) + GAP * (len(widths[part]) - 1) for part in parts))
    height = ABOVE + max(panel.height for panel in rows[0]) + GAP
    canvas, draw = _page(line, TOP + len(parts) * len(rows) * height, texts)
    size = _fit(draw, [f"{name} {what}" for name, what in captions], 32, line)
    lines = [(row[part], caption, widths[part]) for part in parts for row, caption in zip(rows, captions, strict=True)]
    for i, (row, (name, what), of_row) in enumerate(lines):
        x, y = MARGIN, TOP + i * height
        _text(draw, (x, y), name, size, INK, bold=True)
        after = draw.textlength(f"{name} ", ImageFont.load_default(size=size))
        _text(draw, (x + round(after) + 6, y), what, size, GREY)
        for panel, width in zip(row, of_row, strict=True):
            canvas.paste(panel, (x, y + ABOVE), _rounded(panel.size))
            x += width + GAP
    return canvas


def _page(line: int, bottom: int, texts: tuple[str, str, str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper for lines of ``line`` pixels that end at ``bottom``, with title, subtitle and warning on it."""
    title, about, warning = texts
    canvas = Image.new("RGB", (line + 2 * MARGIN, bottom + 70 * bool(warning) + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (MARGIN, MARGIN - 8), title, _fit(draw, [title], 54, line), INK, bold=True)
    _text(draw, (MARGIN, MARGIN + 62), about, _fit(draw, [about], 32, line), GREY)
    if warning:
        _text(draw, (MARGIN, bottom + 8), warning, _fit(draw, [warning], 34, line), RED, bold=True)
    return canvas, draw


def _level(panels: Sequence[Panel]) -> Sequence[Panel]:
    """One level of every image."""
    if len({(panel.name, panel.stride) for panel in panels}) > 1:
        raise ValueError(f"every image needs panels of the same levels, got {[(p.name, p.stride) for p in panels]}")
    return panels


def _panel_size(image: Image.Image, height: int, narrowest: int) -> tuple[int, int, int]:
    """Width of a panel's cell, and width and height of the panel."""
    fitting = round(height * image.width / image.height)
    width = min(max(fitting, narrowest), 3 * HEIGHT)  # captions need some, and panoramas get no more
    height = min(max(round(width * image.height / image.width), 1), TALLEST)
    return width, max(min(round(height * image.width / image.height), width), 1), height  # towers get no taller


def _of_images(images: Sequence[Image.Image]) -> str:
    """What the caption says of the images."""
    if len({image.size for image in images}) > 1:
        return f"{len(images)} of several sizes"
    return f"{images[0].width} x {images[0].height} pixels"


def _of_panels(level: Sequence[Panel]) -> str:
    """What the caption says of a level: the grid, where it is that of all images."""
    return level[0].about if len({panel.features.shape for panel in level}) == 1 else level[0].read


def write(picture: Image.Image, path: Path) -> None:
    """Save a picture atomically; its folder is made if it does not exist.

    Raises:
        ValueError: Its format holds no picture of this size.
        OSError: It cannot be written.
    """
    form = FORMATS[path.suffix.lower()]
    if max(picture.size) > LONGEST.get(form, math.inf):
        raise ValueError(
            f"{path} cannot be written: the picture has {picture.width} x {picture.height} pixels, and {form} takes at "
            f"most {LONGEST[form]} a side; choose .png, or draw fewer images"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as part:
            picture.save(part, form, quality=95)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _enlarge(colors: Tensor, stride: int, image: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A level's colors (h, w, 3) as large as the image's panel, smoothly; every position is centered on its pixels.

    The last row and column may reach beyond the image and are cut there.
    """
    box = (0, 0, image[0] / stride, image[1] / stride)
    return Image.fromarray(colors.numpy()).resize(size, Image.Resampling.BICUBIC, box=box)


def _rounded(size: tuple[int, int]) -> Image.Image:
    """A mask with smooth round corners, drawn four times as large because Pillow does not smooth edges."""
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * size[0] - 1, 4 * size[1] - 1), 4 * RADIUS, fill=255)
    return mask.resize(size, Image.Resampling.LANCZOS)


def _fit(draw: ImageDraw.ImageDraw, texts: Sequence[str], size: float, width: int) -> float:
    """The largest font size from SMALLEST to ``size`` at which each text fits ``width`` pixels."""
    while (
        size > SMALLEST
        and max(draw.textlength(_plain(text), ImageFont.load_default(size=size)) for text in texts) > width
    ):
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
