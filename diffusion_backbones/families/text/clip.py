"""Prompts for networks conditioned on one or two CLIP text encoders (SD 1.x, SD 2.x, SDXL)."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.configs import Config

ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_UNUSED = (
    "embeddings.position_ids",
    "text_projection.weight",
    "logit_scale",
)  # some files hold them, some models need them


@torch.no_grad()
def encode(
    load: LoadText, prompts: list[str], padding: str, names: tuple[str, ...] = ("text_encoder",)
) -> dict[str, Tensor]:
    """Encode prompts as diffusers' pipelines do, without guidance.

    One encoder gives its last hidden state after the final LayerNorm. Two give the last but one of each, concatenated
    along channels, and the second one's pooled projection.

    Args:
        load: Component name -> (tokenizer, text model). Each is let go before the next is loaded.
        prompts: P strings.
        padding: ``max_length`` or ``longest``, the tokenizer's own words.
        names: Component names of the text encoders.

    Returns:
        ``prompt_embeds`` (P, tokens, channels) and, with two encoders, ``pooled_prompt_embeds`` (P, channels), float32.

    Raises:
        ValueError: A prompt has more tokens than the tokenizer's limit.
    """
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for name in names:
        if len(names) > 1:
            state, pooled = penultimate(*load(name), prompts, padding)
        else:
            tokenizer, model = load(name)
            state = model(tokenize(tokenizer, prompts, padding))[0]
            del model
        states.append(state)
    result = {"prompt_embeds": torch.cat(states, dim=-1).float()}
    return result if pooled is None else result | {"pooled_prompt_embeds": pooled.float()}


@torch.no_grad()
def penultimate(
    tokenizer: Any, model: Any, prompts: list[str], padding: str, truncate: bool = False
) -> tuple[Tensor, Tensor]:
    """The last but one hidden state (P, tokens, channels), and the pooled output, projected if the model does that (P,
    channels).
    """
    output = model(tokenize(tokenizer, prompts, padding, truncate), output_hidden_states=True)
    return output.hidden_states[-2].float(), _pooled(output).float()


@torch.no_grad()
def pooled(tokenizer: Any, model: Any, prompts: list[str]) -> Tensor:
    """The pooled output alone, (P, channels), of as much of a prompt as the encoder takes."""
    return _pooled(model(tokenize(tokenizer, prompts, "max_length", truncate=True))).float()


def _pooled(output: Any) -> Tensor:
    found: Tensor = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return found


def tokenize(tokenizer: Any, prompts: list[str], padding: str, truncate: bool = False) -> Tensor:
    """Token ids (P, tokens).

    Args:
        truncate: Cut what is too long, as diffusers does where a T5 encoder reads the whole prompt beside.

    Raises:
        ValueError: A prompt is longer than the tokenizer's limit.
    """
    limit = tokenizer.model_max_length
    for prompt in prompts:
        length = len(tokenizer(prompt, verbose=False).input_ids)
        if length > limit and not truncate:
            raise ValueError(
                f"the prompt {prompt[:60]!r}... has {length} tokens and the text encoder takes {limit}, start and end "
                "included; shorten it"
            )
    tokens: Tensor = tokenizer(
        prompts, padding=padding, max_length=limit, truncation=truncate, return_tensors="pt"
    ).input_ids
    return tokens


def text_model(config: Config, state: Mapping[str, Tensor], where: str) -> Any:
    """transformers' text model with these weights, on the CPU, in eval mode.

    It is built without transformers' ``from_pretrained``, which fills tensors that a file lacks with random numbers.

    Args:
        config: Its ``config.json``.
        state: Its weights, with or without the leading ``text_model.`` that depends on the version of transformers.
        where: Names the files in errors.

    Raises:
        ValueError: It is not a CLIP text model, or the weights are not its weights.
    """
    import transformers

    kind = (config.get("architectures") or ARCHITECTURES)[0]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: the config names {kind!r}, and a text encoder of this family is one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    cls = getattr(transformers, kind)
    with safetensors_io.unfilled():
        model = cls(cls.config_class.from_dict(dict(config))).eval()
    full = safetensors_io.shapes(model)
    named = {
        _own_name(name, full): tensor
        for name, tensor in state.items()
        if name.removeprefix("text_model.") not in _UNUSED or name in full
    }
    safetensors_io.check_tensors(full, {name: tuple(tensor.shape) for name, tensor in named.items()}, full, kind, where)
    stored = {name: tensor.dtype for name, tensor in named.items()}
    safetensors_io.check_floating(stored, model.state_dict(), kind, where)
    safetensors_io.fill(model, named.items())
    for name, buffer in list(model.named_buffers()):  # no file holds them: the positions 0, 1, 2 ...
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(
            leaf, torch.arange(buffer.shape[-1], device="cpu").expand(buffer.shape), persistent=False
        )
    return model


def _own_name(name: str, full: safetensors_io.Shapes) -> str:
    bare = name.removeprefix("text_model.")
    return next((known for known in (bare, f"text_model.{bare}") if known in full), name)


class BlankTokenizer:
    """The little of a CLIP tokenizer that the empty prompt needs, for files that hold weights and no vocabulary.

    Args:
        bos_token_id, eos_token_id, pad_token_id: The three ids of an empty prompt.
        model_max_length: Tokens that the text encoder takes.
    """

    def __init__(self, bos_token_id: int, eos_token_id: int, pad_token_id: int, model_max_length: int):
        self.bos, self.eos, self.pad, self.model_max_length = bos_token_id, eos_token_id, pad_token_id, model_max_length

    def __call__(self, prompts: str | list[str], padding: str = "longest", **kwargs: Any) -> Any:
        if any(prompts):
            raise FileNotFoundError(
                f"the prompt {prompts!r} needs a tokenizer, and a single-file checkpoint has none, so that only the "
                "empty prompt can be encoded. Give prompt_embeds=, or the file beside a whole checkpoint in the "
                "diffusers layout ('local-dir:' or 'hf-hub:'), or load a diffusers folder."
            )
        row = [self.bos, self.eos]
        if padding == "max_length":
            row += [self.pad] * (self.model_max_length - 2)
        return SimpleNamespace(input_ids=row if isinstance(prompts, str) else torch.tensor([row] * len(prompts)))
