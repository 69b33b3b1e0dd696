"""The training set as it travels: compressed pictures in shards below a transfer's limit, and one table of them.

``photographs.py`` writes it. ``pack.json`` holds a row for every picture and the digest of every shard;
``tokenizer/`` the tokenizer of its captions. :func:`load` checks all of it before a picture is used.

    python scripts/tinysd/pack.py PACK CACHE      # decodes it, which training does by itself where it was not done
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 192
"""Width and height of a picture in pixels."""


@dataclass(frozen=True)
class Row:
    """A picture: where its bytes are, what it shows, and whether training must not see it."""

    shard: int
    start: int
    length: int
    caption: str
    kind: str
    source: str
    held_out: bool


@dataclass(frozen=True)
class Pack:
    """The pictures of a folder; ``digest`` is that of every byte and every row."""

    folder: Path
    rows: list[Row]
    digest: str

    @property
    def training(self) -> int:
        """How many pictures, the first ones, are for training; the others are held out."""
        return sum(not row.held_out for row in self.rows)


def shard_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` lies: each in a folder of its own, so that a transfer can take some of them."""
    return folder / str(number) / "pictures.bin"


def write(folder: Path, pictures: Iterable[tuple[bytes, dict[str, str | bool]]], limit: int) -> Pack:
    """Write pictures with their caption, kind, source and held_out into shards of at most ``limit`` bytes."""
    rows: list[Row] = []
    number, shard = 0, bytearray()
    digests: list[str] = []

    def close() -> None:
        path = shard_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shard)
        digests.append(hashlib.sha256(shard).hexdigest())

    for data, facts in pictures:
        if shard and len(shard) + len(data) > limit:
            close()
            number, shard = number + 1, bytearray()
        rows.append(Row(number, len(shard), len(data), **facts))  # type: ignore[arg-type]
        shard += data
    close()
    table = {"shards": digests, "rows": [list(asdict(row).values()) for row in rows]}
    (folder / "pack.json").write_text(json.dumps(table))  # last: it says that the shards are whole
    return Pack(folder, rows, _digest(table))


def _digest(table: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def load(folder: Path) -> Pack:
    """Read the table and check every shard.

    Raises:
        SystemExit: The folder holds no finished pack, a shard is missing or damaged, or a picture has no caption.
    """
    path = folder / "pack.json"
    if not path.is_file():
        raise SystemExit(f"{folder} holds no pack.json; run python scripts/tinysd/photographs.py DATA {folder} first.")
    table = json.loads(path.read_text())
    for number, expected in enumerate(table["shards"]):
        shard = shard_path(folder, number)
        if not shard.is_file():
            raise SystemExit(f"{shard} is missing; {path} names {len(table['shards'])} shards. Copy it or pack again.")
        if hashlib.sha256(shard.read_bytes()).hexdigest() != expected:
            raise SystemExit(f"{shard} is damaged: its SHA-256 is not the one in {path}. Copy it or pack again.")
    rows = [Row(*row) for row in table["rows"]]
    if any(row.held_out for row in rows[: Pack(folder, rows, "").training]):
        raise SystemExit(f"{path}: held-out pictures stand among those for training, expected after them. Pack again.")
    nameless = [i for i, row in enumerate(rows) if not row.caption.strip()]
    if nameless:
        raise SystemExit(
            f"{path}: {len(nameless)} pictures have no caption, the first is row {nameless[0]}. Pack again."
        )
    return Pack(folder, rows, _digest(table))


def decode(data: bytes, what: str) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8.

    Raises:
        SystemExit: It is no picture, or has another size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{what} cannot be decoded: {error}. Replace it or leave it out.") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise SystemExit(f"{what} has {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {SIDE} x {SIDE}.")
    return pixels


def _fill(task: tuple[Path, Path, list[tuple[int, Row]]]) -> None:
    folder, target, part = task
    images = np.load(target, mmap_mode="r+")
    shards = {number: shard_path(folder, number).read_bytes() for number in {row.shard for _, row in part}}
    for i, row in part:
        images[i] = decode(shards[row.shard][row.start : row.start + row.length], f"row {i} of {folder}")
    images.flush()


def pixels(pack: Pack, cache: Path) -> np.ndarray:
    """All pictures, (N, SIDE, SIDE, 3) uint8, mapped from a file in ``cache`` that is made at the first call."""
    mark = cache / "pixels.digest"
    if not mark.is_file() or mark.read_text() != pack.digest:
        # A process of its own: its workers need not import torch.
        subprocess.run([sys.executable, __file__, str(pack.folder), str(cache)], check=True)
    return np.load(cache / "pixels.npy", mmap_mode="c")  # torch wants an array that may be written to


def main() -> None:
    folder, cache = (Path(argument) for argument in sys.argv[1:])
    pack = load(folder)
    target, mark = cache / "pixels.npy", cache / "pixels.digest"
    cache.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    np.lib.format.open_memmap(target, "w+", np.uint8, (len(pack.rows), SIDE, SIDE, 3)).flush()
    numbered = list(enumerate(pack.rows))
    parts = [(folder, target, numbered[i : i + 512]) for i in range(0, len(numbered), 512)]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(parts))) as pool:
        for _ in pool.imap_unordered(_fill, parts):
            pass
    mark.write_text(pack.digest)


if __name__ == "__main__":
    main()
