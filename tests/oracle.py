"""An independent oracle: the stock, whole diffusers network with plain hooks, and ids read as text.

Nothing of the package is used here. An id becomes a module path by rewriting its words, and attention maps come from
the softmax of the whole score matrix.
"""

from __future__ import annotations

import re
from typing import Any

import torch

RULES = [
    (r"^unet-in$", "conv_in<"),
    (r"^unet-after-conv-in$", "conv_in"),
    (r"^unet-out$", "conv_out"),
    (r"^(down|up)-level(\d+)-(down|up)sampler-out$", r"\1_blocks.\2.\3samplers.0"),
    (r"^encoder-level(\d+)-repeat(\d+)-", r"encoder.down_blocks.\1.@\2-"),
    (r"^(down|up)-level(\d+)-repeat(\d+)-", r"\1_blocks.\2.@\3-"),
    (r"^mid-repeat(\d+)-", r"mid_block.@\1-"),
    (r"^mid-", "mid_block.@0-"),
    (r"@(\d+)-res-increment$", r"resnets.\1.conv2"),
    (r"@(\d+)-res-out$", r"resnets.\1"),
    (r"@(\d+)-res-in$", r"resnets.\1<"),
    (r"@(\d+)-vit-out$", r"attentions.\1"),
    (r"@(\d+)-vit-block(\d+)-out$", r"attentions.\1.transformer_blocks.\2"),
    (r"@(\d+)-vit-block(\d+)-", r"attentions.\1.transformer_blocks.\2."),
    (r"\.ffn-inner$", ".ff.net.0"),
    (r"\.self-([qkv])$", r".attn1.to_\1"),
    (r"\.cross-q$", ".attn2.to_q"),
    (r"\.self-(map|out)$", r".attn1|\1"),
    (r"\.cross-(map|out)$", r".attn2|\1"),
]


def path(activation: str) -> str:
    """Module path of an id; ``<`` is the module's input, ``|map`` and ``|out`` an attention layer's map and output."""
    for pattern, replacement in RULES:
        activation = re.sub(pattern, replacement, activation)
    return activation


class Oracle:
    """Runs a whole U-Net (or watches an image encoder) with hooks on every module and answers for ids.

    ``plain`` is for networks whose attention has no transformer around it.
    """

    def __init__(self, unet: Any, plain: bool = False):
        self.unet, self.plain, self.outputs, self.inputs = unet, plain, {}, {}
        for name, module in unet.named_modules():
            module.register_forward_hook(lambda _, args, output, name=name: self._keep(name, args, output))

    def _keep(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        self.outputs[name] = output[0] if isinstance(output, tuple) else output
        self.inputs[name] = args[0] if args else None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.outputs.clear()
        self.unet(*args, **kwargs)

    def __getitem__(self, activation: str) -> torch.Tensor:
        where = path(activation).replace(
            ".transformer_blocks.0.attn1", "" if self.plain else ".transformer_blocks.0.attn1"
        )
        if where.endswith("<"):
            return self.inputs[where[:-1]]
        if where.endswith("|map"):
            return self._map(where[:-4])
        return self.outputs[where.removesuffix("|out")]

    def _map(self, where: str) -> torch.Tensor:
        heads = self.unet.get_submodule(where).heads
        q, k = (self.outputs[f"{where}.to_{x}"].unflatten(-1, (heads, -1)).transpose(1, 2) for x in "qk")
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
