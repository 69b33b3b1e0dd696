"""Prompts for networks conditioned on the states of a language model: T5 and its kin, BERT, Gemma, and models that also
write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.configs import Config

ARCHITECTURES = ("T5EncoderModel", "UMT5EncoderModel", "BertModel", "Gemma2Model")
GENERATIVE = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3Model",
    "Qwen3ForCausalLM",
    "Mistral3ForConditionalGeneration",
)
"""Whole language models of billions of parameters, which are run in the dtype that their files hold."""
_DECODER = ("decoder.", "lm_head.")
_UNUSED = "embeddings.position_ids"  # some files of BERT hold it, and the model makes it itself


@torch.no_grad()
def encode(tokenizer: Any, model: Any, prompts: list[str], tokens: int, masked: bool = True) -> tuple[Tensor, Tensor]:
    """Encode prompts as diffusers' pipelines do, padded to ``tokens``.

    Args:
        masked: Whether padding is masked inside the encoder; the pipelines of FLUX and SD3 let words see it.

    Returns:
        Embeddings (P, tokens, channels) and mask (P, tokens), 1 for text and 0 for padding, both float32.

    Raises:
        ValueError: A prompt has more than ``tokens`` tokens.
    """
    check_length(tokenizer, prompts, tokens)
    batch = tokenizer(prompts, padding="max_length", max_length=tokens, return_tensors="pt")
    states: Tensor = model(batch.input_ids, attention_mask=batch.attention_mask if masked else None)[0]
    return states.float(), batch.attention_mask.float()


@torch.no_grad()
def penultimate(tokenizer: Any, model: Any, prompts: list[str], said: list[str], tokens: int) -> tuple[Tensor, Tensor]:
    """What a language model makes of prompts before its last layer, padded to ``tokens`` on the right.

    Args:
        said: What is encoded of each prompt: itself and what stands around it.

    Returns:
        Embeddings (P, tokens, channels) and mask (P, tokens), as :func:`encode`.

    Raises:
        ValueError: A prompt is too long.
    """
    check_length(tokenizer, prompts, tokens, said)
    batch = tokenizer(said, padding="max_length", padding_side="right", max_length=tokens, return_tensors="pt")
    states: Tensor = model.base_model(
        batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[-2]
    return states.float(), batch.attention_mask.float()


def check_length(tokenizer: Any, prompts: list[str], tokens: int, said: list[str] | None = None) -> None:
    """Raise ``ValueError`` if a prompt, or what is ``said`` of it to the encoder, has more than ``tokens`` tokens."""
    for prompt, text in zip(prompts, said or prompts, strict=True):
        length = len(tokenizer(text, verbose=False).input_ids)
        if length > tokens:
            raise ValueError(
                f"the prompt {prompt[:60]!r}... has {length} tokens and the network takes {tokens}; shorten it"
            )


def check_padding(padding: str) -> None:
    """Raise ``ValueError`` for any padding but that to a fixed length, which the networks of these encoders were
    trained with.
    """
    if padding != "max_length":
        raise ValueError(
            f"prompt_padding={padding!r}: prompts of this network are always padded to its length; use 'max_length'"
        )


def text_model(config: Config, state: Mapping[str, Tensor], where: str) -> Any:
    """transformers' model with these weights, on the CPU, in eval mode, in their dtype.

    Args:
        config: Its ``config.json``, whose ``architectures`` names one of :data:`ARCHITECTURES`.
        state: Its weights. Of tensors that the model ties, files hold one name or all.
        where: Names the files in errors.

    Raises:
        ValueError: The weights are not its weights.
    """
    import transformers
    from accelerate import init_empty_weights

    kind = config["architectures"][0]
    cls = getattr(transformers, kind)
    with torch.device("cpu"), init_empty_weights(include_buffers=False):  # buffers are computed, no file holds them
        model = cls(cls.config_class.from_dict(dict(config))).eval()
    model.tie_weights()
    full, first = safetensors_io.shapes(model), _first_names(model)
    named = {first.get(name, name): tensor for name, tensor in state.items() if name != _UNUSED}
    safetensors_io.check_tensors(
        dict.fromkeys(first.values()), {name: tuple(tensor.shape) for name, tensor in named.items()}, full, kind, where
    )
    stored = {name: tensor.dtype for name, tensor in named.items()}
    safetensors_io.check_floating(stored, model.state_dict(), kind, where)
    safetensors_io.fill(model, named.items())
    model.tie_weights()
    return model


def pretrained(config: Config, folder: Path) -> Any:
    """A language model as transformers loads it from its folder, on the CPU, in eval mode, in its own dtype.

    Its files were written by several versions of transformers, which renamed its parts; transformers knows all the
    names.

    Args:
        config: Its ``config.json``, whose ``architectures`` names one of :data:`GENERATIVE`.
        folder: Holds its config and its ``.safetensors`` files.

    Raises:
        ValueError: The files lack weights.
    """
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    model, loaded = cls.from_pretrained(
        folder,
        config=cls.config_class.from_dict(dict(config)),
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of {cls.__name__}, the first is {missing[0]}; download it again"
        )
    for name, tensor in model.named_parameters():
        safetensors_io.check_finite(tensor, name, str(folder))
    return model.eval()


def is_decoder(kind: str, name: str) -> bool:
    """Whether a tensor is of the decoder of a whole T5, whose encoder alone is read."""
    return "T5" in kind and name.startswith(_DECODER)


def _first_names(model: Any) -> dict[str, str]:
    """Every name in a model's ``state_dict`` -> the first name that its tensor has there."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
