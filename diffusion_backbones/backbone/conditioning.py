"""What conditions a call: the backbone's own tensors, with those that the call gives in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.backbone.call_arguments import check_prompts
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.ops.describe import shape
from diffusion_backbones.ops.tensor_checks import FLOATING, ValueChecks, readable
from diffusion_backbones.spec.concepts import filled, of_classes
from diffusion_backbones.spec.recipe import Recipe

MASKS = {"prompt_attention_mask": "prompt_embeds", "prompt_attention_mask_2": "prompt_embeds_2"}
"""Which tokens are text, 1 or 0 each, and the embeddings of those tokens."""
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def embedded(
    prompter: Prompter, recipe: Recipe, b: int = 1, prompt: Any = None, labels: Any = None
) -> dict[str, Tensor]:
    """The text of a recipe, or what a call of ``b`` images gives in its place, as tensors with 1 or ``b`` rows.

    Raises:
        FileNotFoundError: There is no text encoder.
        TypeError, ValueError: Prompt or labels are no strings, or of another number.
    """
    text = recipe.prompt if prompt is None else prompt
    if recipe.classes:
        return prompter.classes(of_classes(text, labels, recipe.classes, b))
    return prompter(check_prompts(text, b) if labels is None else filled(text, labels, b))


def merge_conditioning(
    own: Mapping[str, Tensor],
    given: Mapping[str, Any],
    b: int,
    name: str,
    values: ValueChecks,
    tokens: int | None = None,
) -> dict[str, Tensor]:
    """The backbone's conditioning with a call's own in place, every tensor with a batch axis of ``b``.

    Args:
        own: Name -> (1, ...).
        given: Name -> (...) or (1 or B, ...).
        b: Number of images.
        name: Of the backbone, for errors.
        values: Gets the checks of what is given: finite, masks of 0 and 1 that keep a token of every text.
        tokens: How many the text must have, where a level has a channel for each.

    Raises:
        TypeError: The network is not conditioned on such a tensor, or it is of another kind.
        ValueError: It has another shape.
    """
    tensors = dict(own)
    for key, value in given.items():
        if key not in own:
            raise TypeError(f"{name} is not conditioned on {key}; it takes {', '.join(own) or 'none'}")
        tensors[key] = _like(own[key], key, value, b)
        values.finite(key, tensors[key])
        if key in MASKS and readable(tensors[key]):
            mask = tensors[key]
            values.add(((mask == 0) | (mask == 1)).all(), f"{key} must be 1 for text and 0 for padding")
            values.add((mask != 0).any(-1).all(), f"{key} must keep a token of every text, and one has none")
    if given:
        _check_lengths(tensors, name, tokens)
    return {key: t.expand(b, *t.shape[1:]) for key, t in tensors.items()}


def _like(like: Tensor, key: str, value: Any, b: int) -> Tensor:
    """A tensor of a call with a batch axis, in the dtype and on the device of the backbone's own."""
    tensor = _tensor(like, key, value)
    batched = tensor if tensor.ndim == like.ndim else tensor[None]
    same_channels = like.ndim <= 1 or key in MASKS or batched.shape[-1] == like.shape[-1]
    if batched.ndim != like.ndim or not same_channels or batched.shape[0] not in (1, b):
        raise ValueError(f"{key} must be {tuple(like.shape[1:])} or ({b}, ...), got {shape(tensor)}")
    if 0 in batched.shape:
        raise ValueError(f"{key} must have at least one token, got {shape(tensor)}")
    return batched.to(like)


def _tensor(like: Tensor, key: str, value: Any) -> Tensor:
    """A value as a tensor of the kind that ``like`` is: floating point, integers for classes, 0 and 1 for masks.

    Raises:
        TypeError: It is of another kind.
    """
    tensor = value if isinstance(value, Tensor) else _as_tensor(key, value)
    kinds: tuple[torch.dtype, ...]
    if key in MASKS:
        kinds, kind = (torch.bool, *INTEGERS, *FLOATING), "0 and 1"
    elif not like.is_floating_point():
        kinds, kind = INTEGERS, "integers"
    elif like.ndim == 1:
        kinds, kind = (*INTEGERS, *FLOATING), "real numbers"
    else:
        kinds, kind = FLOATING, "floating point"
    if tensor.dtype not in kinds or tensor.layout != torch.strided:
        raise TypeError(f"{key} must be a dense tensor of {kind}, got {tensor.dtype}, {tensor.layout}")
    return tensor


def _as_tensor(key: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{key} must be a tensor, got {type(value).__name__}") from None


def _check_lengths(tensors: Mapping[str, Tensor], name: str, tokens: int | None) -> None:
    """Raise ``ValueError`` unless masks are as long as what they mask, and the text as long as a level needs it."""
    for mask, embeds in MASKS.items():
        if mask in tensors and tensors[mask].shape[1] != tensors[embeds].shape[1]:
            raise ValueError(
                f"{embeds} has {tensors[embeds].shape[1]} tokens and {mask} {tensors[mask].shape[1]}; pad the "
                "embeddings to it, and give the mask too"
            )
    if tokens is not None and tensors["prompt_embeds"].shape[1] != tokens:
        raise ValueError(
            f"{name} has a channel for each of {tokens} tokens of the text, so prompt_embeds must have as many, got "
            f"{tensors['prompt_embeds'].shape[1]}"
        )
