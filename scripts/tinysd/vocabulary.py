"""A tokenizer whose vocabulary is made of the training set's captions."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 2048
"""Tokens at most: the 512 bytes, and merges until every frequent word is one token."""


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
