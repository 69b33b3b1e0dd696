"""Prompts -> embeddings, computed once and cached on disk.

A text encoder is loaded when a prompt is seen for the first time, encodes it, and is freed. A second start reads the
few hundred kilobytes of its embeddings and never loads it. The cache is keyed by the content of the text encoder's
files, and what is read of it is compared with what was written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_backbones.families import FAMILIES, Architecture, family_name
from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.text import clip, reading, tokenizers, words
from diffusion_backbones.loading.fingerprint import cache_folder
from diffusion_backbones.loading.source import Source
from diffusion_backbones.ops import atomic, safetensors_io
from diffusion_backbones.spec.concepts import Places

log = logging.getLogger(__name__)
_encoding = threading.Lock()


def no_text_encoder(prompt: str) -> FileNotFoundError:
    """The error of a prompt that nothing at hand can embed."""
    return FileNotFoundError(
        f"prompt={prompt!r} needs a text encoder, and this backbone has none: it was built without weights or loaded "
        "from a folder that save_pretrained wrote. Give prompt_embeds=, or load it with pretrained=True or "
        "checkpoint_path=."
    )


class Prompter:
    """Encodes prompts for one checkpoint.

    Args:
        network: Its architecture.
        source: Has its text encoders; None if there are none.
        padding: ``max_length`` or ``longest``.
    """

    def __init__(self, network: Architecture, source: Source | None, padding: str):
        self.network, self.source, self.padding = network, source, padding

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of version 0.1 hold the name of the family, and the configs."""
        if "network" not in state:
            state = {"network": FAMILIES[state["family"]](state["configs"])} | state
        self.network, self.source, self.padding = state["network"], state["source"], state["padding"]

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """P prompts -> conditioning tensors with P rows, float32 on the CPU.

        Every prompt is encoded alone, so its row does not depend on the others.

        Raises:
            FileNotFoundError: There is no text encoder.
            ValueError: A prompt is no text or too long, or prompts that are not padded have different lengths.
        """
        rows = self._rows(prompts)
        lengths = {prompt: row["prompt_embeds"].shape[1] for prompt, row in rows.items() if "prompt_embeds" in row}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"prompt_padding='longest' leaves prompts at their lengths, here {lengths}; give those of one length "
                "per call, or pad them"
            )
        return {name: torch.cat([rows[prompt][name] for prompt in prompts]) for name in rows[prompts[0]]}

    def classes(self, images: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """P lists of n prompts, one for each class -> conditioning tensors with P rows, whose text has n tokens.

        A class is the last token of its prompt, which has read all of it: what CLIP takes for the text.

        Raises:
            FileNotFoundError, ValueError: As for prompts.
        """
        all_rows = Prompter(self.network, self.source, "longest")._rows([p for prompts in images for p in prompts])
        texts = [torch.cat([all_rows[p]["prompt_embeds"][:, -1:] for p in prompts], 1) for prompts in images]
        return all_rows[images[0][0]] | {"prompt_embeds": torch.cat(texts)}

    def _rows(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Prompt -> its conditioning tensors."""
        if self.source is None:
            raise no_text_encoder(prompts[0])
        if odd := next((prompt for prompt in prompts if not _is_text(prompt)), None):
            raise ValueError(
                f"prompt={odd!r:.80} holds halves of characters (surrogates) and is no text; give it in UTF-8"
            )
        fingerprint = self.source.text_fingerprint()
        load: LoadText = self.source.text
        if len(self.network.text_encoders) == 1:  # several are loaded in turn, so that one is in memory
            load = functools.cache(load)
        return {prompt: self._row(fingerprint, load, prompt) for prompt in dict.fromkeys(prompts)}

    def rows(self, prompt: str, places: Places) -> tuple[tuple[int, ...], ...]:
        """For each word of a prompt its tokens; see :func:`~diffusion_backbones.families.text.words.rows`.

        Raises:
            FileNotFoundError: There is no tokenizer.
            ValueError: A word is cut off, or has no token.
        """
        network, source = self.network, self.source
        if source is None:
            raise no_text_encoder(prompt)
        config = reading.read_config(source.text_config(network.words), f"{source}: {network.words}/config.json")
        folder = source.tokenizer_folder(network.words.replace("text_encoder", "tokenizer"))
        [kind] = config["architectures"]
        tokenizer = tokenizers.load(folder, kind)
        said, begin = network.said(tokenizer, prompt), network.said(tokenizer, words.MARK).text.index(words.MARK)
        limit, *_ = network.conditioning_shapes["prompt_embeds"]
        if kind in clip.ARCHITECTURES:  # whose tokens may be the first of more
            limit = min(limit, tokenizer.model_max_length)
        return words.rows(tokenizer, said, begin, places, limit)

    def _row(self, fingerprint: str, load: LoadText, prompt: str) -> dict[str, Tensor]:
        if not self.network.text_encoders:
            return self._encode(load, prompt)  # nothing to load, so nothing to keep
        path = self._path(fingerprint, prompt)
        with _encoding:  # two threads load one text encoder, not two
            row = _read(path, self.network)
            if row is None:
                row = self._encode(load, prompt)
                _write(path, row)
        return row

    def _encode(self, load: LoadText, prompt: str) -> dict[str, Tensor]:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            row = self.network.encode_prompts(load, [prompt], self.padding)
        if wrong := misfit(self.network, row):
            raise ValueError(f"{self.source}: the text encoders do not belong to the {self.network.denoiser}: {wrong}")
        return row

    def _path(self, fingerprint: str, prompt: str) -> Path:
        said = [fingerprint, family_name(self.network), self.network.text_encoders, self.padding, prompt]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
        return cache_folder() / "prompts" / f"{key}.safetensors"


def _is_text(prompt: str) -> bool:
    """Whether a string can be written: bytes that are no UTF-8 come from a command line or a file as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def misfit(network: Architecture, row: Mapping[str, Tensor]) -> str:
    """What is wrong with the embeddings of one prompt as a network's conditioning, or nothing."""
    for name, shape in network.conditioning_shapes.items():
        if name not in row:
            return f"there is no {name}"
        given = row[name]
        width = shape[-1:] if "mask" not in name else ()  # tokens are as many as the text encoder takes
        if (
            given.ndim != 1 + len(shape)
            or len(given) != 1
            or not given.numel()
            or (width and given.shape[-1:] != width)
        ):
            return f"{name} must be {(1, *shape)}, and is {tuple(given.shape)}"
        if given.dtype != torch.float32 and shape:
            return f"{name} must be torch.float32, and is {given.dtype}"
        if not bool(given.isfinite().all()):
            return f"{name} holds NaN or infinity"
    return ""


def _read(path: Path, network: Architecture) -> dict[str, Tensor] | None:
    """The embeddings in a file of the cache, or None if there are none, or others than were written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            row = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
            known = (opened.metadata() or {}).get("digest")
        whole = known is None or known == _digest(row)
        wrong = misfit(network, row) if whole else "its content is not what was written"
    except (SafetensorError, OSError) as error:
        wrong = str(error)
    if not wrong:
        return row if known else None  # other versions noted no digest
    log.warning("the cached prompt %s cannot be read and is made again: %s", path, wrong)
    return None


def _write(path: Path, embeddings: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.remove_left_over(path.parent)
        safetensors_io.write(path, embeddings, {"digest": _digest(embeddings)})
    except OSError as error:
        log.warning("the prompt is not cached, so the text encoder is loaded again next time: %s", error)


def _digest(embeddings: Mapping[str, Tensor]) -> str:
    """Names embeddings by names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(embeddings.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
