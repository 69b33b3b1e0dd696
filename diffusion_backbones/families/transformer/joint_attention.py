"""Joint attention over text and image tokens (MMDiT): where activations are, and maps as the network computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_backbones.ops.execution_order import BYPASS, NONE, Step
from diffusion_backbones.spec.activations import IN, MAP, OUT, Port, Site

if TYPE_CHECKING:
    from torch import Tensor

IMAGE = Port(index=1)
"""What a block returns behind the text."""
BEHIND_TEXT, IN_BEHIND_TEXT = Port(tokens="last"), Port("in", tokens="last")
"""The image in a sequence of both, in what a layer returns and in what enters it."""
DOUBLE = ("to_q", "to_k", "add_q_proj", "add_k_proj")
"""What a map of a block with separate projections for text is computed from."""


class Inner(NamedTuple):
    """Where the widest activation of a feed-forward layer is, and how wide."""

    path: str
    port: Port
    channels: int


def double_block(
    path: str, block: int, channels: int, heads: int, stride: int, modulation: str, inner: Inner | None = None
) -> Iterator[Site]:
    """Activations of the image's half of a block that keeps two streams, in forward order.

    Args:
        path: Of the block.
        block: Its number.
        channels: Width of the stream.
        heads: Heads of attention.
        stride: Pixels per token.
        modulation: As in :class:`Site`.
        inner: The inside of the feed-forward layer, by default that of diffusers' ``FeedForward``.
    """
    name, inner = f"vit-block{block}", inner or Inner("ff.net.0", OUT, 4 * channels)
    for qkv in "qkv":
        yield Site(f"{name}-{qkv}", f"{path}.attn.to_{qkv}", OUT, channels, stride, "tokens")
    yield Site(f"{name}-cross-map", f"{path}.attn", MAP, heads, stride, "attention", DOUBLE)
    yield Site(f"{name}-self-map", f"{path}.attn", MAP, heads, stride, "attention", DOUBLE)
    yield Site(f"{name}-attn-out", f"{path}.attn.to_out.0", OUT, channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.ff", IN, channels, stride, "tokens")
    yield Site(f"{name}-ffn-inner", f"{path}.{inner.path}", inner.port, inner.channels, stride, "tokens")
    yield Site(f"{name}-out", path, IMAGE, channels, stride, "tokens", modulation=modulation)


def single_block(path: str, block: int, channels: int, heads: int, stride: int, modulation: str) -> Iterator[Site]:
    """Activations of the image tokens of a block with one stream of text and image; arguments as above."""
    name = f"vit-block{block}"
    for qkv in "qkv":
        yield Site(f"{name}-{qkv}", f"{path}.attn.to_{qkv}", BEHIND_TEXT, channels, stride, "tokens")
    yield Site(f"{name}-cross-map", f"{path}.attn", MAP, heads, stride, "attention")
    yield Site(f"{name}-self-map", f"{path}.attn", MAP, heads, stride, "attention")
    yield Site(f"{name}-attn-out", f"{path}.attn", BEHIND_TEXT, channels, stride, "tokens")
    yield Site(f"{name}-out", path, IMAGE, channels, stride, "tokens", modulation=modulation)


def joint_block(block: Any) -> list[Step]:
    """The image's half decides how far a joint block is needed; the text's half of the same stage goes with it."""
    second = [Step("attn2", BYPASS)] if getattr(block, "attn2", None) is not None else []
    own = getattr(block, "ff_context", None) is not None
    text = [Step("norm2_context", BYPASS), Step("ff_context", BYPASS)] if own else []
    return [Step("attn", NONE), *second, Step("norm2", BYPASS), Step("ff", BYPASS), *text]


def rotation(rotary: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """What turns (B, heads, sequence, d) by the cosines and sines of its positions, each (sequence, d)."""
    from diffusers.models.embeddings import apply_rotary_emb

    def rotate(x: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_emb(x, rotary, sequence_dim=2)
        return rotated

    return rotate


def joint_map(
    attention: Any,
    site: Site,
    recorded: tuple[Tensor, ...],
    tokens: int,
    text_first: bool,
    rotate: Callable[[Tensor], Tensor] | None,
    average: bool,
    registers: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention from image queries to text (``cross-map``) or to image (``self-map``). One softmax runs over both.

    Args:
        attention: The stock layer.
        site: Which of the two.
        recorded: What ``site.taps`` gave.
        tokens: Number of image tokens.
        text_first: Whether text comes before image in the layer's sequence.
        rotate: (B, heads, sequence, d) -> the same with positions applied, or None.
        average: Average over heads.
        registers: Learned tokens before the text, which are not part of it.
        bias: (B, sequence), added to the scores of every head and query.

    Returns:
        (B, heads, image tokens, text or image tokens), or without heads.
    """
    import torch

    from diffusion_backbones.ops.attention_maps import probabilities, split_heads  # torch

    norms = (attention.norm_q, attention.norm_k)
    q, k = (split_heads(attention, x, norm) for x, norm in zip(recorded[:2], norms, strict=True))
    if len(recorded) == 4:
        norms = (attention.norm_added_q, attention.norm_added_k)
        text = [split_heads(attention, x, norm) for x, norm in zip(recorded[2:], norms, strict=True)]
        q, k = (torch.cat((t, x) if text_first else (x, t), dim=2) for t, x in zip(text, (q, k), strict=True))
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    length = q.shape[2]
    image = slice(length - tokens, length) if text_first else slice(0, tokens)
    words = slice(registers, length - tokens) if text_first else slice(tokens, length)
    return probabilities(q[:, :, image], k, words if site.id.endswith("cross-map") else image, average, bias)
