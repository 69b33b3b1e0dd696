"""Tokenizers from files: read by transformers' own classes alone, found whole, and fitted to their text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_backbones.families.text import clip

CLASSES = {
    **dict.fromkeys(clip.ARCHITECTURES, "CLIPTokenizerFast"),
    "T5EncoderModel": "T5TokenizerFast",
    "UMT5EncoderModel": "T5TokenizerFast",
}
"""Class of a text encoder -> that of its tokenizer where the files do not name it."""
CLIP = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
CONFIG = "tokenizer_config.json"


def load(folder: Path, encoder: str) -> Any:
    """The tokenizer in a folder.

    Args:
        folder: Holds its files.
        encoder: Class of the text encoder that it is for. CLIP's get a CLIP tokenizer, as in diffusers.

    Raises:
        ValueError: A file is broken or cut short, or names a class that is not transformers' own.
    """
    import transformers

    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path} is empty; download it again")
    named = _named_class(folder, encoder)
    always = encoder in clip.ARCHITECTURES
    chosen = CLASSES.get(encoder) if always or named is None else "AutoTokenizer"
    if chosen is None:
        raise ValueError(f"{folder} has no {CONFIG}, which names the class of the tokenizer; download it again")
    try:
        tokenizer = getattr(transformers, chosen).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError:
        raise
    except Exception as error:  # what a broken file raises depends on its format
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}. Download it again.") from error
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder} names no padding token, which {CONFIG} must; download it again")
    if always or not (folder / "tokenizer.json").is_file():
        _check_whole(tokenizer, folder)
    return tokenizer


def fit(tokenizer: Any, model: Any, folder: Path) -> None:
    """Bound a tokenizer by its text encoder, which has so many positions and so many rows of its vocabulary.

    The encoder then raises ``ValueError`` for a token that it has no row for.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)

    def check(table: Any, args: tuple[Tensor, ...]) -> None:
        beyond = args[0][args[0] >= table.num_embeddings]
        if len(beyond):
            token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
            raise ValueError(
                f"the token {token!r} has number {int(beyond[0])} in {folder}, and the text encoder has "
                f"{table.num_embeddings} rows; the two do not belong together, or the prompt must do without it"
            )

    model.get_input_embeddings().register_forward_pre_hook(check)


def _named_class(folder: Path, encoder: str) -> str | None:
    """The class that a tokenizer's config names, or 'None'; None without a config."""
    import transformers

    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    name = config.get("tokenizer_class")
    if "auto_map" in config:
        raise ValueError(f"{path} names code of its own (auto_map), which is never run; give transformers' tokenizer")
    if name is not None and not hasattr(transformers, str(name)):
        raise ValueError(f"{path} names the class {name!r}, which is not one of transformers'; its code is never run")
    if name is not None and encoder in clip.ARCHITECTURES and name not in CLIP:
        raise ValueError(f"{path} names the class {name!r}, and the tokenizer of {encoder} is one of {', '.join(CLIP)}")
    return str(name)


def _check_whole(tokenizer: Any, folder: Path) -> None:
    """Check of byte-pair encodings that merges give every token, which is not so where either list is cut short."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    other = ("byte_fallback", "ignore_merges", "continuing_subword_prefix")  # in which other rules give tokens
    if model.get("type") != "BPE" or any(model.get(key) for key in other):
        return
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    suffix = model.get("end_of_word_suffix") or ""
    merged = {"".join(pair) for pair in pairs}
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    for token in model["vocab"]:
        if token not in merged and token not in special and len(token.removesuffix(suffix) or token) > 1:
            raise ValueError(
                f"{folder}: no merge gives the token {token!r} of the vocabulary, so that one of the two lists is cut "
                "short; download it again"
            )
