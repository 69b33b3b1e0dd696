"""Image files as people have them: what Pillow reads is read, metadata costs none, and memory is asked first."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from timm.data import create_transform

import diffusion_backbones as db
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.extraction import extract, images, stages
from diffusion_backbones.extraction.stages import Reader
from diffusion_backbones.ops import free_memory, image_decoding

NAME = "tinysd_gdf"
CONFIG = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3}
PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone():
    return db.create_model(NAME, pretrained=True)


def png(picture: Image.Image, chunk: bytes, n: int, behind: bool) -> bytes:
    """A PNG with a chunk put ``n`` times before or behind its pixels."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data, at = file.getvalue(), -12 if behind else 33
    return data[:at] + n * chunk + data[at:]


def chunk(kind: bytes, data: bytes, checksum: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ checksum)


CHUNKS = {
    "a workflow of 2 MB": (chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b'{"nodes": []}' * 160_000)), 1),
    "a text of 2 MB": (chunk(b"zTXt", b"text\0\0" + zlib.compress(b"x" * 2_000_000)), 1),
    "a profile of 2 MB": (chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"\0" * 2_000_000)), 1),
    "70 MB of texts": (chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000)), 70),
    "a text with a wrong checksum": (chunk(b"tEXt", b"key\0value", checksum=1), 1),
    "a text that is not compressed": (chunk(b"zTXt", b"key\0\0nothing"), 1),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("what", CHUNKS)
def test_what_is_no_pixel_costs_no_image(tmp_path, what, behind):
    picture = Image.open(PHOTO).crop((40, 40, 72, 64))
    (tmp_path / "a.png").write_bytes(png(picture, *CHUNKS[what], behind))
    assert images.load(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_pixels_that_are_damaged_are_still_refused(tmp_path):
    data = png(Image.open(PHOTO).convert("RGB"), *CHUNKS["a workflow of 2 MB"], False)
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read as an image"):
        images.load(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(PHOTO).crop((0, 0, 48, 32)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        pixels = np.asarray(stored.convert("RGB"))
    turns = {  # the EXIF standard: where the stored first row and first column are seen
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    assert np.array_equal(np.asarray(images.load(tmp_path / "a.png")), turns[orientation](pixels))


@pytest.mark.parametrize("value", ["broken", (6, 6), 0, 9, 3.5, b"\x06"])
def test_exif_that_cannot_be_used_costs_no_image(tmp_path, monkeypatch, value):
    photo = Image.open(PHOTO).crop((0, 0, 48, 32))
    photo.save(tmp_path / "a.png")
    broken = lambda self: (_ for _ in ()).throw(struct.error("broken")) if value == "broken" else {0x0112: value}  # noqa: E731
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "getexif", broken)
    assert images.load(tmp_path / "a.png").tobytes() == photo.tobytes()


def test_exif_that_cannot_be_written_again_costs_no_image(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = Image.open(PHOTO).crop((0, 0, 48, 32))
    photo.save(tmp_path / "a.png", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: (_ for _ in ()).throw(struct.error("out of range")))
    assert images.load(tmp_path / "a.png").tobytes() == photo.rotate(-90, expand=True).tobytes()


# Transparency.


def test_what_is_transparent_lies_on_white(tmp_path):
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 255, (32, 32, 4), dtype=np.uint8)
    seen[..., 3] = 255
    seen[:8, :, 3] = 0  # with colours that nobody sees
    seen[8:16, :, 3] = 128
    Image.fromarray(seen).save(tmp_path / "a.png")
    Image.fromarray(seen).save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.png", "a.webp"):
        pixels = np.asarray(images.load(tmp_path / name)).astype(float)
        assert np.array_equal(pixels[16:], seen[16:, :, :3]), "opaque pixels keep their values"
        assert (pixels[:8] == 255).all()
        half = seen[8:16, :, :3] * (128 / 255) + 255 * (127 / 255)
        assert np.abs(pixels[8:16] - half).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB"])
def test_transparency_of_other_modes(tmp_path, mode):
    picture = Image.new("RGB", (8, 8), (200, 200, 200))
    picture.paste((10, 10, 10), (0, 0, 4, 8))  # the transparent half
    if mode == "LA":
        alpha = Image.new("L", (8, 8), 255)
        alpha.paste(0, (0, 0, 4, 8))
        picture = Image.merge("LA", (picture.convert("L"), alpha))
        picture.save(tmp_path / "a.png")
    elif mode == "P":
        picture = picture.quantize(2)
        picture.save(tmp_path / "a.png", transparency=picture.getpixel((0, 0)))
    else:
        picture = picture.convert(mode)
        picture.save(tmp_path / "a.png", transparency=picture.getpixel((0, 0)))
    pixels = np.asarray(images.load(tmp_path / "a.png"))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 200).all()


# Which files are images.


def test_every_format_that_pillow_reads_is_found(tmp_path, caplog):
    picture = Image.new("RGB", (32, 32), (200, 0, 0))
    kinds = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.JPE": "JPEG", "e.jp2": "JPEG2000", "g.tga": "TGA", "h.mpo": "MPO"}
    kinds |= {"i.apng": "PNG", "j.avif": "AVIF", "k.pgm": "PPM", "l.pbm": "PPM"}
    Image.init()
    kinds = {name: kind for name, kind in kinds.items() if kind in Image.SAVE}
    for name, kind in kinds.items():
        picture.convert({"k.pgm": "L", "l.pbm": "1"}.get(name, "RGB")).save(tmp_path / name, kind)
    for name in ("a.HEIC", "b.heic", "c.jpg_large", "notes.txt", "noext", ".hidden.xyz", "Thumbs.db", "table.pdf"):
        (tmp_path / name).write_bytes(b"no image")
    found = images.find([tmp_path])
    expected = {*kinds} | ({"a.HEIC", "b.heic"} if ".heic" in image_decoding.readable_suffixes() else set())
    assert {file.name for file in found} == expected
    for file in found:
        if file.name in kinds:
            assert images.load(file.path).size == (32, 32)
    told = caplog.text
    assert all(text in told for text in ("1 .jpg_large", "1 .txt", "1 without suffix", "1 .pdf"))
    assert "thumbs" not in told.lower()
    assert "xyz" not in told


def test_heif_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(image_decoding, "readable_suffixes", lambda: frozenset({".jpg"}))
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    with pytest.raises(ValueError, match=r"HEIF.*pip install pillow-heif"):
        images.load(tmp_path / "a.HEIC")
    with pytest.raises(FileNotFoundError, match=r"it holds 1 \.heic; pip install pillow-heif"):
        images.find([tmp_path])
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    images.find([tmp_path])
    assert "left out what is no image by its suffix: 1 .heic; pip install pillow-heif" in caplog.text


# Sizes.


def test_a_limit_of_pixels_is_told_and_can_be_raised(tmp_path, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ValueError, match=r"300 x 200 pixels, 60000 in all, and the limit is 40000.*--max-pixels 60000"):
        images.load(tmp_path / "a.png")
    assert images.load(tmp_path / "a.png", max_pixels=60_000).size == (300, 200)
    assert Image.MAX_IMAGE_PIXELS == 20_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as Pillow documents it
    assert images.load(tmp_path / "a.png").size == (300, 200)


def test_what_does_not_fit_the_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (400, 250)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "free_memory", lambda: 100_000 * images.DECODING - 1)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"400 x 250 pixels need .* of memory here, and .* are free"):
        images.load(tmp_path / "a.png")


DECODED = """
import pathlib, sys
from PIL import Image
from diffusion_backbones.extraction import images
photo = pathlib.Path(sys.argv[1])
images.load(sys.argv[2])

def status(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
picture = images.load(photo)
print((status("VmHWM") - before) / picture.width / picture.height, images.DECODING)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_decoding_takes_no_more_memory_than_is_reckoned(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGBA", (2500, 2500), (9, 200, 30, 100)).save(tmp_path / "a.png", exif=exif)
    command = [sys.executable, "-c", DECODED, str(tmp_path / "a.png"), str(PHOTO)]
    took, reckoned = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert took <= reckoned * 1.3, f"{took} bytes for each pixel"


@pytest.mark.parametrize("shape", [(1000, 3), (3, 1000), (100, 9), (9, 100), (640, 60)])
@pytest.mark.parametrize("size", [16, 33])
def test_a_strip_is_cut_before_it_is_resized(shape, size):
    """The pixels are those of timm's transform, which resizes first, up to rounding."""
    photo = Image.open(PHOTO).convert("RGB").resize(shape, Image.Resampling.LANCZOS)
    expected = create_transform((3, size, size), **CONFIG)(photo)
    found = images.transform(CONFIG, size)(photo)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2.1 * 2 / 255


def test_a_strip_takes_memory_for_its_square_alone(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args, **kw: sizes.append(size) or resize(self, size, *args, **kw)
    )
    for shape in ((6000, 1), (1, 6000), (2000, 2)):
        assert images.transform(CONFIG, 256)(Image.new("RGB", shape)).shape == (3, 256, 256)
    assert max(width * height for width, height in sizes) <= 256 * 256


def test_ordinary_images_are_resized_as_ever(tmp_path):
    photo = Image.open(PHOTO).convert("RGB")
    for shape in ((451, 300), (300, 451), (800, 100)):
        picture = photo.resize(shape)
        assert torch.equal(images.transform(CONFIG, 64)(picture), create_transform((3, 64, 64), **CONFIG)(picture))


def test_free_memory_knows_of_containers(tmp_path, monkeypatch):
    import psutil

    group = tmp_path / "user" / "app"
    group.mkdir(parents=True)
    for folder, most in ((group, "3000000"), (tmp_path / "user", "2000000"), (tmp_path, "max")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text("1500000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: "0::/user/app\n" if self.name == "cgroup" else read(self, *a, **k)
    )
    assert free_memory.free_memory() == 2_000_000 - 1_500_000 + 100_000
    (tmp_path / "user" / "memory.max").write_text("max\n")
    assert free_memory.free_memory() == 3_000_000 - 1_500_000 + 100_000
    (group / "memory.max").write_text("max\n")
    assert free_memory.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


# One odd image costs itself.


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), RuntimeError("odd"), ZeroDivisionError()])
@pytest.mark.parametrize("workers", [0, 2])
def test_whatever_preprocessing_raises_costs_one_image(backbone, tmp_path, monkeypatch, error, workers):
    for i in range(3):
        Image.new("RGB", (32, 32 + i), (9, 9, 9)).save(tmp_path / f"{i}.png")
    init = Reader.__init__

    def patched(self, *args):
        init(self, *args)
        good = self.preprocess

        def preprocess(image):
            if image.height == 33:
                raise error
            return good(image)

        self.preprocess = preprocess

    monkeypatch.setattr(Reader, "__init__", patched)
    summary = extract(backbone, images.find([tmp_path]), tmp_path / "out", workers=workers)
    assert (summary.done, list(summary.failed)) == (2, ["1.png"])
    assert type(error).__name__ in summary.failed["1.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name, as Unix has")
def test_what_is_no_file_costs_itself_and_is_not_waited_for(backbone, tmp_path):
    """Nothing ever comes out of these pipes."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "c.png"):
        os.mkfifo(photos / name)
    (photos / "b.png").symlink_to("c.png")
    Image.open(PHOTO).crop((0, 0, 32, 32)).save(photos / "d.png")
    summary = extract(backbone, images.find([photos]), tmp_path / "out")
    assert (summary.done, sorted(summary.failed)) == (1, ["a.png", "b.png", "c.png"])
    assert "a.png is no file, but a pipe" in summary.failed["a.png"]
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: .* is no file, but a pipe"):
        images.load(photos / "a.png")


def test_an_image_too_large_for_the_free_memory_costs_itself(backbone, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    forward = DiffusionBackbone.forward
    monkeypatch.setattr(stages, "free_memory", lambda: 64 * 64 * stages.bytes_per_pixel(backbone) * 0.5)
    monkeypatch.setattr(
        DiffusionBackbone,
        "forward",
        lambda self, x: pytest.fail("it was computed") if x.shape[-1] == 64 else forward(self, x),
    )
    summary = extract(backbone, images.find([tmp_path]), tmp_path / "out")
    assert (summary.done, list(summary.failed)) == (1, ["b.png"])
    assert "does not fit the memory" in summary.failed["b.png"]
    with pytest.raises(ValueError, match="a batch of 1 with 64 x 64 pixels needs"):
        extract(backbone, images.find([tmp_path]), tmp_path / "squares", size=64)
    assert not (tmp_path / "squares").exists()
