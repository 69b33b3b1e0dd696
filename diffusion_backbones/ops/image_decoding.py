"""Opening image files with Pillow: which formats it reads here, and that neither metadata nor its limits cost an
image.
"""

from __future__ import annotations

import functools
import io
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image

HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
"""Suffixes that cameras and telephones give to files in the HEIF format."""
INSTALL_HEIF = "pip install pillow-heif"
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow only recognizes, or gives to another program."""
OPENED_AS_JPEG = ("MPO",)
"""Formats that another one's decoder opens."""
DEPTHS = (".pfm",)
"""Suffixes of files that hold floating-point numbers and no pictures."""
PNG = b"\x89PNG\r\n\x1a\n"
DESCRIBING = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tIME", b"sPLT", b"hIST")
"""Chunks of a PNG that say something about the picture and hold no pixels."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""
ON_THEIR_SIDE = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
_opening = threading.Lock()


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of the formats that the installed Pillow reads, and of HEIF if pillow-heif is installed."""
    _register_heif()
    suffixes = Image.registered_extensions()
    formats = {*Image.OPEN, *OPENED_AS_JPEG}.difference(NOT_READ)
    return frozenset(suffix for suffix, name in suffixes.items() if name in formats).difference(DEPTHS)


@functools.cache
def _register_heif() -> None:
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener  # an extra

        register_heif_opener()


def most_pixels() -> int | None:
    """The most pixels of an image that Pillow opens, 179 million unless a program sets another limit; None for no
    limit.
    """
    return Image.MAX_IMAGE_PIXELS and 2 * Image.MAX_IMAGE_PIXELS


def read(
    path: Path, check: Callable[[Image.Image], None], convert: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Open and decode an image file of any size. A PNG whose texts or profile Pillow refuses is read without them.

    Args:
        path: The file.
        check: Called before pixels are decoded; raises an error to refuse the image.
        convert: What becomes of the upright image, by default :func:`as_rgb`.

    Raises:
        Exception: Each of Pillow's decoders fails in its own way.
        OSError: There is no file.
    """
    check_regular(path)
    _register_heif()
    try:
        return _read(path, check, convert or as_rgb)
    except MemoryError:
        raise
    except Exception:
        stripped = _without_descriptions(path)
        if stripped is None:
            raise
        return _read(stripped, check, convert or as_rgb)


def check_regular(path: Path) -> None:
    """Check that a path is that of a file: a pipe, a socket or a device may be read for ever.

    Raises:
        OSError: There is none, or something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no file, but a pipe, a socket, a device or a folder")


def _read(
    file: Path | IO[bytes], check: Callable[[Image.Image], None], convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    with _open(file) as image:
        check(image)
        return convert(upright(image))


def _open(file: Path | IO[bytes]) -> Image.Image:
    """Open without Pillow's limit of pixels, which is one for the whole process; callers have their own."""
    with _opening:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _without_descriptions(path: Path) -> IO[bytes] | None:
    """A PNG without the chunks that describe it, or None if the file is no PNG or has none of them."""
    with path.open("rb") as file:
        if file.read(len(PNG)) != PNG:
            return None
        chunks = list(_chunks(file))
    kept = [data for kind, data in chunks if kind not in DESCRIBING]
    return io.BytesIO(b"".join([PNG, *kept])) if len(kept) < len(chunks) else None


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The kind of each chunk of a PNG, and the whole chunk; nothing is kept of those that describe it."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind in DESCRIBING:
            file.seek(size + 4, io.SEEK_CUR)
            yield kind, b""
        else:
            yield kind, head + file.read(size + 4)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8; 1, upright, where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in UPRIGHT else 1
    except Exception:  # EXIF is broken in more ways than Pillow has errors for, and the pixels are what counts
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says. Its metadata is left behind and never written again."""
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def has_transparency(image: Image.Image) -> bool:
    """Whether pixels may be transparent: by a channel, or by a palette or colour that is."""
    return any(band in "Aa" for band in image.getbands()) or "transparency" in image.info


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB; what is transparent lies on white, so that nothing is seen that viewers do not show. Opaque pixels keep
    their values.
    """
    if not has_transparency(image):
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
