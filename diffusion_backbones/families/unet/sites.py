"""Where the activations of a U-Net are: arithmetic on its config. Tests compare it with the built network.

Levels, widths and depths follow the constructor of ``UNet2DConditionModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_backbones.spec.activations import IN, MAP, OUT, Port, Site
from diffusion_backbones.spec.configs import Config

Vit = Callable[[str, str, int, int, int, int], Iterator[Site]]
"""Stage of the ids, module path, width, stride, number of blocks, heads -> the activations of what attends there."""


def sites(config: Config, latent_stride: int, plain_mid: Vit | None = None) -> Iterator[Site]:
    """Every activation of a U-Net with this config, in forward order.

    Args:
        config: Its upstream config.
        latent_stride: Pixels per latent position.
        plain_mid: Gives those of the attention in a middle block without cross-attention, if it has one.
    """
    levels = _Levels.of(config, latent_stride)
    yield Site("unet-in", "conv_in", IN, config.get("in_channels", 4), latent_stride, "map")
    yield Site("unet-after-conv-in", "conv_in", OUT, levels.widths[0], latent_stride, "map")
    yield from _down(levels, config["down_block_types"])
    yield from _mid(levels, config.get("mid_block_type", "UNetMidBlock2DCrossAttn"), plain_mid)
    yield from _up(levels, config["up_block_types"])
    yield Site("unet-out", "conv_out", OUT, config.get("out_channels", 4), latent_stride, "map")


@dataclass(frozen=True)
class _Levels:
    """What a config says about each level, fine to coarse.

    Attributes:
        widths: Channels.
        repeats: Residual blocks on the way down; there is one more on the way up.
        depths, up_depths: Transformer blocks, as a number or a number for each repeat; ``up_depths`` coarse to fine.
        heads: Heads of attention.
        stride: Pixels per position of the finest.
    """

    widths: Sequence[int]
    repeats: Sequence[int]
    depths: Sequence[Any]
    up_depths: Sequence[Any]
    heads: Sequence[int]
    stride: int

    @classmethod
    def of(cls, config: Config, stride: int) -> _Levels:
        widths = list(config["block_out_channels"])
        n = len(widths)
        depths = _spread(config.get("transformer_layers_per_block", 1), n)
        return cls(
            widths=widths,
            repeats=_spread(config.get("layers_per_block", 2), n),
            depths=depths,
            up_depths=config.get("reverse_transformer_layers_per_block") or depths[::-1],
            heads=_spread(config.get("num_attention_heads") or config.get("attention_head_dim", 8), n),
            stride=stride,
        )

    def __len__(self) -> int:
        return len(self.widths)


def _spread(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


def _down(levels: _Levels, kinds: Sequence[str]) -> Iterator[Site]:
    for level, kind in enumerate(kinds):
        stage, prefix, width = f"down-level{level}", f"down_blocks.{level}", levels.widths[level]
        stride, heads = levels.stride * 2**level, levels.heads[level]
        for repeat, depth in enumerate(_spread(levels.depths[level], levels.repeats[level])):
            name = f"{stage}-repeat{repeat}"
            yield from _residual(name, f"{prefix}.resnets.{repeat}", width, stride)
            if vit := _attends(kind):
                yield from vit(name, f"{prefix}.attentions.{repeat}", width, stride, depth, heads)
        if level < len(levels) - 1:
            yield Site(f"{stage}-downsampler-out", f"{prefix}.downsamplers.0", OUT, width, 2 * stride, "map")


def _mid(levels: _Levels, kind: str | None, plain: Vit | None) -> Iterator[Site]:
    stride, width = levels.stride * 2 ** (len(levels) - 1), levels.widths[-1]
    if kind is not None:
        yield from _residual("mid-repeat0", "mid_block.resnets.0", width, stride)
    if vit := _attends(kind or "") or plain:
        yield from vit(
            "mid", "mid_block.attentions.0", width, stride, _spread(levels.depths[-1], 1)[0], levels.heads[-1]
        )
        yield from _residual("mid-repeat1", "mid_block.resnets.1", width, stride)


def _up(levels: _Levels, kinds: Sequence[str]) -> Iterator[Site]:
    last = len(levels) - 1
    skips = [levels.widths[0]]
    for level, width in enumerate(levels.widths):
        skips += [width] * (levels.repeats[level] + (level < last))
    entering = levels.widths[-1]
    for level, kind in enumerate(kinds):
        stage, prefix, width = f"up-level{level}", f"up_blocks.{level}", levels.widths[last - level]
        stride, heads = levels.stride * 2 ** (last - level), levels.heads[last - level]
        for repeat, depth in enumerate(_spread(levels.up_depths[level], levels.repeats[last - level] + 1)):
            name, resnet = f"{stage}-repeat{repeat}", f"{prefix}.resnets.{repeat}"
            yield Site(f"{name}-res-in", f"{resnet}.norm1", IN, entering + skips.pop(), stride, "map")
            entering = width
            yield from _residual(name, resnet, width, stride)
            if vit := _attends(kind):
                yield from vit(name, f"{prefix}.attentions.{repeat}", width, stride, depth, heads)
        if level < last:
            yield Site(f"{stage}-upsampler-out", f"{prefix}.upsamplers.0", OUT, width, stride // 2, "map")


def _attends(kind: str) -> Vit | None:
    """What attends in a block of this class."""
    known = {"SimpleCrossAttn": added_attention, "CrossAttn": _vit, "Attn": plain_attention}
    return next((vit for name, vit in known.items() if name in kind), None)


def _residual(name: str, path: str, width: int, stride: int) -> Iterator[Site]:
    yield Site(f"{name}-res-increment", f"{path}.conv2", OUT, width, stride, "map")
    yield Site(f"{name}-res-out", path, OUT, width, stride, "map")


def plain_attention(name: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    """A layer of self-attention with no transformer around it."""
    block = f"{name}-vit-block0"
    for qkv in "qkv":
        yield Site(f"{block}-self-{qkv}", f"{path}.to_{qkv}", OUT, width, stride, "tokens")
    yield Site(f"{block}-self-map", path, MAP, heads, stride, "attention")
    yield Site(f"{name}-vit-out", path, OUT, width, stride, "map")


def added_attention(name: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    """A layer of attention to the text and the image at once: one query, and one softmax over the keys of both."""
    block, taps = f"{name}-vit-block0", ("to_q", "add_k_proj", "to_k")
    for qkv in "qkv":
        yield Site(f"{block}-self-{qkv}", f"{path}.to_{qkv}", OUT, width, stride, "tokens")
    yield Site(f"{block}-self-map", path, MAP, heads, stride, "attention", taps)
    yield Site(f"{block}-cross-map", path, MAP, heads, stride, "attention", taps)
    yield Site(f"{name}-vit-out", path, OUT, width, stride, "map")


def _vit(name: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    for i in range(depth):
        block, at = f"{name}-vit-block{i}", f"{path}.transformer_blocks.{i}"
        for qkv in "qkv":
            yield Site(f"{block}-self-{qkv}", f"{at}.attn1.to_{qkv}", OUT, width, stride, "tokens")
        yield Site(f"{block}-self-map", f"{at}.attn1", MAP, heads, stride, "attention")
        yield Site(f"{block}-self-out", f"{at}.attn1", OUT, width, stride, "tokens")
        yield Site(f"{block}-cross-q", f"{at}.attn2.to_q", OUT, width, stride, "tokens")
        yield Site(f"{block}-cross-map", f"{at}.attn2", MAP, heads, stride, "attention")
        yield Site(f"{block}-cross-out", f"{at}.attn2", OUT, width, stride, "tokens")
        yield Site(f"{block}-ffn-inner", f"{at}.ff.net.0", OUT, 4 * width, stride, "tokens")
        yield Site(f"{block}-out", at, OUT, width, stride, "tokens")
    yield Site(f"{name}-vit-out", path, Port(index=0), width, stride, "map")
