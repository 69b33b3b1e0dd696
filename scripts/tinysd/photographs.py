"""Pack captioned photographs and drawn scenes for the training of tinysd.

    python scripts/tinysd/photographs.py DATA build/tinysd/pack [--scenes 6000] [--artwork build/tinysd]

DATA holds ``index.csv`` (shard, file, caption, class, source, ...) and the tar files that it names, of pictures of
192 x 192 pixels. One photograph in twenty is held out, by a hash of its name. Half of the scenes show one large object;
held-out objects and the held-out drawing style are in none. What is written: ``pack.py``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pack
import scenes
import sprites
from PIL import Image
from tqdm import tqdm
from vocabulary import tokenizer

QUALITY = 80
"""Of the drawn scenes' WebP; photographs keep their bytes."""
Picture = tuple[bytes, dict[str, "str | bool"]]


def photographs(folder: Path, most: int | None = None) -> Iterator[Picture]:
    """Every photograph of ``index.csv`` in its order, or ``most`` of them spread over it.

    Raises:
        SystemExit: A shard is missing or damaged, lacks a file, or a row has no caption.
    """
    index = folder / "index.csv"
    if not index.is_file():
        raise SystemExit(f"{folder} holds no index.csv, expected captions in it beside the tar files of photographs.")
    rows = list(csv.DictReader(index.open(newline="")))
    missing = {"shard", "file", "caption", "class", "source"} - set(rows[0] if rows else ())
    if missing:
        raise SystemExit(f"{index} has no column {', '.join(sorted(missing))}; every photograph needs one.")
    for line, row in enumerate(rows, 2):
        if not (row["caption"] or "").strip():
            raise SystemExit(f"{index}, line {line}: {row['file']} has no caption. Give it one or leave it out.")
    by_shard: dict[str, list[dict[str, str]]] = {}
    for row in rows[:: max(1, len(rows) // most)] if most else rows:
        by_shard.setdefault(row["shard"], []).append(row)
    for shard, wanted in by_shard.items():
        yield from _shard(folder / shard, wanted)


def _shard(path: Path, wanted: list[dict[str, str]]) -> Iterator[Picture]:
    try:
        with tarfile.open(path) as archive:
            for row in wanted:
                data = archive.extractfile(row["file"]).read()  # type: ignore[union-attr]
                pack.decode(data, f"{path}: {row['file']}")
                held_out = hashlib.sha256(row["file"].encode()).digest()[0] % 20 == 0
                facts = {"caption": row["caption"], "kind": row["class"], "source": row["source"]}
                yield data, {**facts, "held_out": held_out}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise SystemExit(f"{path} is missing or damaged: {error}. Fetch it again.") from error


def _draw(task: tuple[Path, int, int]) -> Picture:
    folder, seed, i = task
    global _sprites
    if "_sprites" not in globals():
        _sprites = sprites.load(folder)
    rng = np.random.default_rng([seed, pack.SIDE, i])
    scene = scenes.draw(rng, _sprites, _sprites.where(False, False), pack.SIDE, large=i % 2 == 0)
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "webp", quality=QUALITY)
    return file.getvalue(), {"caption": scene.caption, "kind": "scene", "source": "drawn", "held_out": False}


def drawn(artwork: Path, number: int, seed: int) -> Iterator[Picture]:
    """Scenes; every other one has one large object."""
    if number == 0:
        return
    sprites.load(artwork)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap(_draw, ((artwork, seed, i) for i in range(number)), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with index.csv and its tar files")
    parser.add_argument("folder", type=Path, help="where the pack goes")
    parser.add_argument("--artwork", type=Path, default=Path("build/tinysd"), help="folder of sprites.py")
    parser.add_argument("--photographs", type=int, metavar="N", help="at most about so many (default all)")
    parser.add_argument("--scenes", type=int, default=6000, metavar="N", help="drawn scenes (default 6000)")
    parser.add_argument("--shard", type=float, default=28.0, metavar="MIB", help="largest shard (default 28)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def everything() -> Iterator[Picture]:
        yield from tqdm(photographs(args.data, args.photographs), desc="photographs", mininterval=5)
        yield from tqdm(drawn(args.artwork, args.scenes, args.seed), desc="scenes", total=args.scenes, mininterval=5)

    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "pack.json").unlink(missing_ok=True)
    ordered = sorted(everything(), key=lambda picture: bool(picture[1]["held_out"]))  # training pictures come first
    packed = pack.write(args.folder, ordered, int(args.shard * 2**20))
    tokenizer([row.caption for row in packed.rows if not row.held_out]).save_pretrained(args.folder / "tokenizer")
    for number in range(packed.rows[-1].shard + 1):
        path = pack.shard_path(args.folder, number)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    print(f"{len(packed.rows)} pictures, {len(packed.rows) - packed.training} held out, data {packed.digest[:16]}")


if __name__ == "__main__":
    main()
