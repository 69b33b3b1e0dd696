"""Attention maps, recomputed from the queries and keys that a network's own fused attention used.

The stock network never forms the probabilities and keeps its fused kernels; here they are computed afterwards, one head
and one chunk of queries at a time. Scores and probabilities are float32 whatever the network's dtype and autocast, as
they are inside the fused kernels: a score of a float16 network may pass 65504.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.ops.autocast import autocast_off, casts

CHUNK = 2**24
"""Scores that may exist at once, per call: 64 MiB in float32."""


def attention_map(
    attention: nn.Module, q: Tensor, k: Tensor, average: bool = False, bias: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) of one attention layer.

    Args:
        attention: The stock layer, for its heads, scale, and query and key norms.
        q: (B, N, C) output of ``to_q``.
        k: (B, M, C) output of ``to_k``.
        average: Average over heads.
        bias: (B, M), added to the scores of every head and query.
        chunk: How many scores are formed at a time, at least one row of M per image.

    Returns:
        (B, heads, N, M), or (B, N, M) if averaged. Rows sum to 1. The dtype is that of ``q``.
    """
    q, k = split_heads(attention, q, attention.norm_q), split_heads(attention, k, attention.norm_k)
    return probabilities(q, k, slice(None), average, bias, chunk)


def split_heads(attention: nn.Module, x: Tensor, norm: Any) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), normalised where the layer normalises its queries or keys."""
    heads: int = attention.heads  # type: ignore[assignment]
    x = x.view(*x.shape[:2], heads, -1).transpose(1, 2)
    return x if norm is None else norm(x)


def linear_probabilities(q: Tensor, k: Tensor, average: bool = False) -> Tensor:
    """The weights of linear attention, relu(q) relu(k)ᵀ over their sum along the keys, which that layer never forms.

    Args:
        q, k: (B, heads, N, d).
        average: Average over heads.

    Returns:
        (B, heads, N, N), or (B, N, N) if averaged, in the dtype of ``q``.
    """
    out: Tensor | float = 0.0
    maps = []
    for head in range(q.shape[1]):
        x, y = torch.relu(q[:, head]), torch.relu(k[:, head])
        scores = product(x, y)
        weights = scores / (scores.sum(-1, keepdim=True) + 1e-15)
        if average:
            out = out + weights / q.shape[1]
        else:
            maps.append(weights)
    return (out if isinstance(out, Tensor) else torch.stack(maps, 1)).to(q.dtype)


def probabilities(
    q: Tensor,
    k: Tensor,
    keys: slice,
    average: bool = False,
    bias: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias)[..., keys], a part at a time.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        keys: The columns to keep; rows sum to 1 over all of them only.
        average, bias, chunk: As for :func:`attention_map`.

    Returns:
        (B, heads, N, kept), or (B, N, kept) if averaged.
    """
    b, heads, n, d = q.shape
    m = k.shape[2]
    kept = len(range(m)[keys])
    out = q.new_zeros((b, n, kept) if average else (b, heads, n, kept))
    rows = max(1, chunk // (b * m))
    parts = [0] if n <= rows else range(0, n, rows)  # a range would make a number of the size of an exported image
    for head in range(heads):
        for i in parts:
            scores = product(q[:, head, i : i + rows], k[:, head], d**-0.5)
            if bias is not None:
                scores = scores + bias[:, None]
            part = scores.softmax(dim=-1).to(q.dtype)[..., keys]
            if average:
                out[:, i : i + rows] += part / heads
            else:
                out[:, head, i : i + rows] = part
    return out


def product(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """scale x yᵀ in float32, or in float64 where the network computes so."""
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    with autocast_off(x.device, casts(x.device)):
        return torch.matmul(x * scale, y.transpose(-1, -2))
