"""In which order the layers that U-Nets and transformers share run: blocks, attention and feed-forward of diffusers."""

from __future__ import annotations

from typing import Any

from diffusion_backbones.ops.execution_order import BYPASS, NONE, Step, stand_in


def transformer_block(block: Any) -> list[Step]:
    """Steps of a ``BasicTransformerBlock``, with or without a second attention layer."""
    second = [Step("norm2", BYPASS), Step("attn2", NONE)] if block.attn2 is not None else []
    return [Step("norm1", BYPASS), Step("attn1", BYPASS), *second, Step("norm3", BYPASS), Step("ff", BYPASS)]


def feed_forward(layer: Any) -> list[Step]:
    """Steps of a ``FeedForward``: its activation, which contains the first projection, and the second projection."""
    return [Step("net.0", BYPASS), Step("net.2", stand_in(layer.net[2].out_features, dim=-1))]


def attention(layer: Any) -> list[Step]:
    """Steps of an ``Attention``: queries and keys before values, and those of a text before those of the image."""
    inner = stand_in(layer.inner_dim, dim=-1)
    added = getattr(layer, "add_k_proj", None) is not None  # in a transformer the text has no projections of its own
    text = [Step("norm_cross", NONE), Step("add_k_proj", inner)] if added else []
    values = [Step("add_v_proj", inner)] if added else []
    return [
        Step("group_norm", NONE),
        Step("to_q", inner),
        *text,
        Step("to_k", inner),
        *values,
        Step("to_v", inner),
        Step("to_out.0", BYPASS),
    ]
