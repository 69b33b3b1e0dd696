"""What people draw on images: points, boxes and masks, in the documented form or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_backbones.ops import image_decoding
from diffusion_backbones.ops.image_decoding import ON_THEIR_SIDE, orientation

IGNORED = 255
"""Label of pixels that count for nothing."""
EDGES = 4
"""Least number of classes without any inner pixel by which interpolated edges are known."""
NUMBERS = (int, float, np.integer, np.floating)
LEAST_INSIDE = 0.5
"""Share of an object's points that must lie in its box."""


def points(values: Any, where: str, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """Points as (K, 2): x and y in pixels.

    Args:
        values: K rows of two finite numbers.
        where: Names them in errors.
        size: (width, height) of the image that they are on.

    Raises:
        ValueError: They have another form, or lie outside the image.
    """
    found = _numbers(values, where, "numbers, 2 for each: rows of [x, y]")
    if found.ndim != 2 or found.shape[1] != 2:
        raise ValueError(
            f"{where} must be numbers, 2 for each: rows of [x, y], got {_form(found)}: {values!r:.80}{_hint(found)}"
        )
    if size is None or not len(found):
        return found
    outside = ~((found >= 0) & (found <= size)).all(1)
    if outside.any():
        raise ValueError(
            f"{where}: {found[outside][0].tolist()} lies outside the image of {size[0]} x {size[1]} pixels; a point is "
            "[x, y] in pixels of the file"
        )
    if len(found) > 1 and found.max() <= 1 and max(size) > 2:
        raise ValueError(f"{where} are shares of the image, all at most 1; a point is [x, y] in pixels of the file")
    return found


def box(
    values: Any, where: str, inside: NDArray[np.float32] | None = None, size: tuple[int, int] | None = None
) -> tuple[float, float, float, float]:
    """A box: x0, y0, x1, y1 in pixels, with x0 < x1 and y0 < y1.

    Args:
        values: Four finite numbers.
        where: Names it in errors.
        inside: (K, 2) points of the object in it.
        size: (width, height) of the image that it is on.

    Raises:
        ValueError: It is no box, or reaches beyond the image by more than a pixel, or the points are not in it, as when
            width and height are given.
    """
    found = _numbers(values, where, "numbers, 4 for each: one [x0, y0, x1, y1]")
    if found.shape != (4,):
        raise ValueError(
            f"{where} must be numbers, 4 for each: one [x0, y0, x1, y1], got {_form(found)}: {values!r:.80}"
        )
    x0, y0, x1, y1 = found.tolist()
    if x0 >= x1 or y0 >= y1:
        raise ValueError(
            f"{where} must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {values!r:.80}; is it x, y, width, height?"
        )
    if size is not None and (min(x0, y0) < -1 or x1 > size[0] + 1 or y1 > size[1] + 1):
        raise ValueError(
            f"{where} must lie in its image of {size[0]} x {size[1]} pixels, as [x0, y0, x1, y1], got {values!r:.80}"
        )
    if inside is not None and len(inside):
        share = np.mean(((inside >= found[:2]) & (inside <= found[2:])).all(1))
        if share < LEAST_INSIDE:
            raise ValueError(
                f"{where} must be [x0, y0, x1, y1], and {values!r:.80} holds {share:.0%} of the object's points; is it "
                "x, y, width, height?"
            )
    return x0, y0, x1, y1


def _numbers(values: Any, where: str, form: str) -> NDArray[np.float32]:
    flat = _flat(values)
    if not all(value is None or (isinstance(value, NUMBERS) and not isinstance(value, bool)) for value in flat):
        raise ValueError(f"{where} must be {form}, got {values!r:.80}")
    try:
        found = np.array(values, np.float32)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:  # rows of several lengths, huge integers
        raise ValueError(f"{where} must be {form}, got {values!r:.80}") from error
    if not np.isfinite(found).all():
        raise ValueError(f"{where} must be finite {form}, got {values!r:.80}; leave out what is not known")
    return found


def _flat(values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    return [part for value in values for part in _flat(value)] if isinstance(values, (list, tuple)) else [values]


def _form(found: NDArray[Any]) -> str:
    return " x ".join(map(str, found.shape)) if found.ndim > 1 else f"{found.size} in a row"


def _hint(found: NDArray[Any]) -> str:
    if found.ndim == 2 and len(found) == 2 and found.shape[1] > 3:
        return "; are these all x, then all y?"
    if found.ndim == 2 and found.shape[1] == 3:
        return "; leave out the third number, and points that are not visible"
    return ""


class _UnfitError(ValueError):
    """A mask of another form."""


def read_mask(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The classes of a mask (H, W), turned upright by its EXIF orientation as images are.

    Args:
        path: A file of one channel, or with a palette.
        size: (width, height) of its image, upright.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image, has another size or several channels, or edges of mixed classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: every image needs a mask of the same name that ends in .png")

    def check(mask: Image.Image) -> None:
        sides = mask.size[::-1] if orientation(mask) in ON_THEIR_SIDE else mask.size
        if sides != size:
            raise _UnfitError(f"{path} has {sides[0]} x {sides[1]} pixels and its image {size[0]} x {size[1]}")
        if mask.mode not in ("L", "P", "1"):
            raise _UnfitError(
                f"{path} has mode {mask.mode}; a mask has one channel of 8 bits, classes from 0 and 255 for what is "
                "ignored"
            )

    try:
        classes = np.array(image_decoding.read(path, check, Image.Image.copy), np.uint8)
    except _UnfitError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    check_edges(classes, str(path))
    return classes


def check_edges(mask: NDArray[np.uint8], where: str) -> None:
    """Check that a mask was not resized with interpolation or compressed with loss.

    Either leaves mixtures of two classes along edges: values that fill no square of 3 x 3 pixels anywhere.

    Raises:
        ValueError: Most of its values are such ones.
    """
    values = np.unique(mask)
    if len(values) <= EDGES or min(mask.shape) < 3:
        return
    views = np.lib.stride_tricks.sliding_window_view(mask, (3, 3))
    centre = mask[1:-1, 1:-1]
    inner = np.unique(centre[(views == centre[..., None, None]).all((2, 3))])
    edges = np.setdiff1d(values, inner)
    if len(inner) and len(edges) >= EDGES and 2 * len(edges) > len(values):
        raise ValueError(
            f"{where}: {len(edges)} of its {len(values)} classes, such as {edges[len(edges) // 2]}, are nowhere more "
            "than an edge. Interpolation or JPEG mixes the numbers of classes: resize masks with nearest neighbours, "
            "and keep them as PNG"
        )


def check_classes(masks: Sequence[NDArray[np.uint8]], where: str) -> None:
    """Check that not all masks hold just 0 and 255, where 255 means an object to whoever wrote them.

    Raises:
        ValueError: They do.
    """
    found = {int(value) for mask in masks for value in np.unique(mask)}
    if found == {0, IGNORED}:
        raise ValueError(f"{where} hold 0 and 255 alone, and 255 is ignored; write 1 for the object in place of 255")
