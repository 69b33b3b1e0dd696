"""What of a backbone is trained: nothing, the denoiser, adapters inside it, or the prompt.

``True`` trains every parameter of the denoiser. ``"lora"`` keeps them and adds peft's low-rank adapters to the
projections of its attention. ``"prompt"`` keeps all networks and trains the embedding of the recipe's prompt, which
starts where the text encoder put it. In every case only what a gradient of the activations reaches is trained.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.families.base import TEXT
from diffusion_backbones.spec.validation import check_count
from diffusion_backbones.surgery.plan import Plan

TRAINABLE = (False, True, "lora", "prompt")
RANK = 8
"""Rank of adapters, unless ``lora_rank`` gives another."""
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Modules of an attention layer that get adapters, where they are left and linear."""


def check_trainable(trainable: Any, lora_rank: Any, prompt_tokens: Any) -> None:
    """Check that the keywords of ``create_model`` about training go together.

    Raises:
        ImportError: Adapters are asked for and peft is not there.
        TypeError: A setting of one way of training with another.
        ValueError: An unknown way, or a number below one.
    """
    if not any(trainable is known or (isinstance(trainable, str) and trainable == known) for known in TRAINABLE):
        raise ValueError(f"trainable must be one of {', '.join(map(repr, TRAINABLE))}, got {trainable!r}")
    for name, value, way in (("lora_rank", lora_rank, "lora"), ("prompt_tokens", prompt_tokens, "prompt")):
        if value is None:
            continue
        if trainable != way:
            raise TypeError(f"{name}={value!r} is for trainable={way!r}, and trainable is {trainable!r}")
        check_count(name, value)
    if trainable == "lora" and find_spec("peft") is None:
        raise ImportError("trainable='lora' needs peft; install it with pip install 'diffusion-backbones[lora]'")


def check_prompt(plan: Plan, prompt_tokens: int | None) -> None:
    """Check that a network has a prompt to learn, of that many tokens.

    Args:
        plan: Of the backbone.
        prompt_tokens: See :func:`first_tokens`.

    Raises:
        ValueError: It has none, or its number of tokens cannot be chosen.
    """
    shapes, name = plan.architecture.conditioning_shapes, plan.declaration.name
    if "prompt_embeds" not in shapes:
        what = ", ".join(shapes) or "nothing"
        raise ValueError(
            f"{name} is conditioned on {what} and not on text, so it has no prompt to train; use trainable=True or "
            "'lora'"
        )
    if prompt_tokens is None:
        return
    if plan.reads_text or "prompt_embeds_2" in shapes:
        why = (
            "its recipe reads one channel per token of the text"
            if plan.reads_text
            else "it takes two texts of fixed lengths"
        )
        raise ValueError(
            f"prompt_tokens={prompt_tokens} changes the length of the text, and {name} cannot: {why}; leave "
            "prompt_tokens out"
        )


def first_tokens(embeddings: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """The first ``n`` tokens of an embedded prompt, (1, n, channels), none of them masked.

    Raises:
        ValueError: It has fewer. More could only repeat some, and equal tokens get equal gradients.
    """
    there = embeddings["prompt_embeds"].shape[1]
    if n > there:
        raise ValueError(
            f"prompt_tokens={n} is more than the {there} tokens of the recipe's prompt, which the learned ones start "
            "from"
        )
    out = dict(embeddings) | {"prompt_embeds": embeddings["prompt_embeds"][:, :n]}
    if "prompt_attention_mask" in out:
        out["prompt_attention_mask"] = torch.ones_like(out["prompt_attention_mask"][:, :n])
    return out


def learned(embeddings: Mapping[str, Tensor], skipped: Collection[str], name: str) -> list[str]:
    """Which of the tensors that condition a network are trained as its prompt.

    Raises:
        ValueError: None has a gradient; ``name`` is that of the backbone.
    """
    found = [key for key in TEXT if key in embeddings and f"conditioning.{key}" not in skipped]
    if not found:
        raise ValueError(
            f"no activation of {name} depends on the prompt, so there is nothing to train; use trainable=True"
        )
    return found


def add_lora(denoiser: nn.Module, rank: int, skipped: Collection[str], name: str) -> None:
    """Give the attention of a denoiser adapters that change nothing yet: B is zero, and the scale is 1.

    Args:
        denoiser: A possibly truncated network, changed in place.
        rank: Of the adapters.
        skipped: Names of parameters that get no gradient, with ``denoiser.`` in front; their modules get no adapter.
        name: Of the backbone, for errors.

    Raises:
        ValueError: There is no such projection.
    """
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig, inject_adapter_in_model

    ends = tuple(f".{projection}" for projection in PROJECTIONS)
    linear = [
        path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear) and path.endswith(ends)
    ]
    targets = [path for path in linear if f"denoiser.{path}.weight" not in skipped]
    if not targets:
        raise ValueError(
            f"no activation of {name} depends on a projection of attention ({', '.join(PROJECTIONS)}), so no adapter "
            "fits; use trainable=True"
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    if isinstance(denoiser, PeftAdapterMixin):
        denoiser.add_adapter(config)  # diffusers' own methods for adapters then know them
    else:
        inject_adapter_in_model(config, denoiser)


def unfreeze(backbone: nn.Module, trainable: bool | str, skipped: Collection[str]) -> None:
    """Of what is trained, unfreeze every parameter that a gradient can reach, as distributed training demands; freeze
    the rest.

    Args:
        backbone: Changed in place.
        trainable: What is trained.
        skipped: Names of parameters that get no gradient.
    """
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(trains(trainable, name) and stock_name(name) not in skipped)


def trains(trainable: bool | str, parameter: str) -> bool:
    """Whether a way of training is about a parameter of the backbone."""
    if trainable == "lora":
        return ".lora_" in parameter
    return bool(trainable) and parameter.startswith("conditioning." if trainable == "prompt" else "denoiser.")


def stock_name(parameter: str) -> str:
    """The name of a parameter before there were adapters; that of an adapter becomes its projection's weight."""
    return re.sub(r"\.lora_[AB]\..*", ".weight", parameter).replace(".base_layer.", ".")


def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` under stock names, with adapters merged into the weights that they adapt."""
    state = {name: tensor for name, tensor in backbone.state_dict().items() if ".lora_" not in name}
    for path, layer in backbone.named_modules():
        for adapter in getattr(layer, "active_adapters", ()) if hasattr(layer, "get_delta_weight") else ():
            weight = f"{path}.base_layer.weight"
            state[weight] = state[weight] + layer.get_delta_weight(adapter).to(state[weight].dtype)
    return {stock_name(name): tensor for name, tensor in state.items()}
