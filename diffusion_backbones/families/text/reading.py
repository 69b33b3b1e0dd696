"""Text encoders with their tokenizers from files: which model it is, and that tokenizer and model fit.

Nothing that a file names is run: code beside it, kernels of attention, tokenizer classes of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from diffusion_backbones.families.text import clip, language_model, tokenizers
from diffusion_backbones.families.upstream import DEEPEST, check_quantization
from diffusion_backbones.ops.safetensors_io import TensorFiles
from diffusion_backbones.spec.configs import Config

WHOLE = {
    "T5Model": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
    "T5WithLMHeadModel": "T5EncoderModel",
    "UMT5Model": "UMT5EncoderModel",
    "UMT5ForConditionalGeneration": "UMT5EncoderModel",
}
"""Class of a whole model -> that of its encoder, which is read from the same files."""
UNNAMED = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "bert": "BertModel"}
"""``model_type`` of a config without ``architectures`` -> the class that is read."""
FOREIGN = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "use_kernels",
)
"""Keys of a config that choose code, which is always transformers' own here."""
LARGEST = 2**31


def read_config(config: Config, where: str) -> Config:
    """A text encoder's config, checked, with ``architectures`` of one class that is read here.

    Raises:
        ValueError: It is of another class, of quantized weights, or has a value that cannot be.
    """
    check_quantization(config, where)
    named = config.get("architectures") or [UNNAMED.get(str(config.get("model_type")), "nothing")]
    known = (*clip.ARCHITECTURES, *language_model.ARCHITECTURES, *language_model.GENERATIVE)
    kind = named[0] if isinstance(named, list) else named
    kind = WHOLE.get(str(kind), kind)
    if kind not in known:
        raise ValueError(f"{where} names {kind!r} in architectures, and the text encoders that are read are {known}")
    _check_numbers(config, where)
    return {**_own_code(config), "architectures": [kind]}


def read(config: Config, files: Sequence[Path], tokenizer: Path, where: str) -> tuple[Any, Any]:
    """Tokenizer and text model, on the CPU, in float32; language models of billions of parameters keep their dtype.

    Args:
        config: Of the text encoder, as its file holds it.
        files: Of its weights.
        tokenizer: The tokenizer's folder.
        where: Names the config's file in errors.

    Raises:
        ValueError: Files are broken, cut short, of another model, or do not belong together.
    """
    config = read_config(config, where)
    [kind] = config["architectures"]
    words = tokenizers.load(tokenizer, kind)
    try:
        if kind in language_model.GENERATIVE:
            model = language_model.pretrained(config, files[0].parent)
        else:
            weights = TensorFiles(files)
            names = [name for name in weights.shapes if not language_model.is_decoder(kind, name)]
            state = dict(weights.read(names, torch.float32, torch.device("cpu")))
            build = clip.text_model if kind in clip.ARCHITECTURES else language_model.text_model
            model = build(config, state, str(weights))
    except (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{where} does not describe {kind}: {error}") from error
    tokenizers.fit(words, model, tokenizer)
    return words, model


def _own_code(value: Any) -> Any:
    """A config without what chooses code, in its parts too."""
    if not isinstance(value, Mapping):
        return value
    return {key: _own_code(part) for key, part in value.items() if key not in FOREIGN}


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_numbers(value, where)
        most = DEEPEST if "layers" in key else LARGEST
        if isinstance(value, int) and value > most:
            raise ValueError(f"{where} has {key} {repr(value)[:80]}; it must be at most {most}")
