"""The training set: scenes at two sizes, their captions, and a tokenizer whose vocabulary is made of these captions.

    python scripts/tinysd/data.py build/tinysd [--small 16000] [--large 4000] [--seed 0]

Written: ``scenes-128.npy`` and ``scenes-256.npy`` (N, S, S, 3) uint8, ``captions-128.json``, ``captions-256.json`` and
``tokenizer/``. A file that is there is whole and is not made again. Held-out identities and the held-out style are in
none of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import scenes
import sprites
from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 2048
"""Tokens at most: the 512 bytes, and merges until every frequent word is one token."""


def _draw(task: tuple[Path, int, int, int]) -> tuple[np.ndarray, str]:
    folder, seed, side, i = task
    global _sprites
    if "_sprites" not in globals():
        _sprites = sprites.load(folder)
    scene = scenes.draw(np.random.default_rng([seed, side, i]), _sprites, _sprites.where(False, False), side)
    return scene.image, scene.caption


def training_scenes(folder: Path, side: int, number: int, seed: int) -> None:
    """Draw ``number`` scenes of ``side`` pixels into ``folder``."""
    pixels, words = folder / f"scenes-{side}.npy", folder / f"captions-{side}.json"
    if words.is_file():
        return
    images = np.lib.format.open_memmap(pixels, "w+", np.uint8, (number, side, side, 3))
    captions = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for image, caption in tqdm(
            pool.imap(_draw, ((folder, seed, side, i) for i in range(number)), 16), total=number, desc=pixels.name
        ):
            images[len(captions)] = image
            captions.append(caption)
    images.flush()
    words.write_text(json.dumps(captions))  # last: it says that the pixels are whole


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with merges learned from ``captions``; any other text falls apart into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    stock = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    bpe.normalizer, bpe.pre_tokenizer = stock.backend_tokenizer.normalizer, stock.backend_tokenizer.pre_tokenizer
    letters = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    words = dict.fromkeys(
        [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    )
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--small", type=int, default=16000, metavar="N", help="scenes of 128 x 128 pixels (default 16000)"
    )
    parser.add_argument(
        "--large", type=int, default=4000, metavar="N", help="scenes of 256 x 256 pixels (default 4000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sprites.load(args.folder)
    training_scenes(args.folder, 128, args.small, args.seed)
    training_scenes(args.folder, 256, args.large, args.seed)
    if not (args.folder / "tokenizer").is_dir():
        tokenizer(json.loads((args.folder / "captions-128.json").read_text())).save_pretrained(
            args.folder / "tokenizer"
        )


if __name__ == "__main__":
    main()
