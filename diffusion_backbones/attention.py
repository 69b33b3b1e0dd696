"""Attention maps, recomputed from the queries and keys that a network's own fused attention used.

The stock network never forms the probabilities and keeps its fused kernels; here they are computed afterwards, one head and
one chunk of queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 2**24
"""Scores that may exist at once, per call: 64 MiB in float32."""


def attention_map(attention: nn.Module, q: Tensor, k: Tensor, average: bool = False, chunk: int = CHUNK) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) of one attention layer.

    Args:
        attention: The stock layer, for its heads, scale, query and key norms, and precision settings.
        q: (B, N, C) output of ``to_q``.
        k: (B, M, C) output of ``to_k``.
        average: Average over heads.
        chunk: How many scores are formed at a time, at least one row of M per image.

    Returns:
        (B, heads, N, M), or (B, N, M) if averaged. Rows sum to 1. The dtype is that of ``q``.
    """
    heads: int = attention.heads                    # type: ignore[assignment]
    scale: float = attention.scale                  # type: ignore[assignment]
    q, k = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k))
    if attention.norm_q is not None:
        q = attention.norm_q(q)                     # type: ignore[operator]
    if attention.norm_k is not None:
        k = attention.norm_k(k)                     # type: ignore[operator]
    b, _, n, _ = q.shape
    m = k.shape[2]
    out = q.new_zeros((b, n, m) if average else (b, heads, n, m))
    rows = max(1, chunk // (b * m))
    for head in range(heads):
        for i in range(0, n, rows):
            part = _probabilities(attention, q[:, head, i : i + rows], k[:, head], scale)
            if average:
                out[:, i : i + rows] += part / heads
            else:
                out[:, head, i : i + rows] = part
    return out


def _probabilities(attention: nn.Module, q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype = q.dtype
    if attention.upcast_attention:
        q, k = q.float(), k.float()
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if attention.upcast_softmax:
        scores = scores.float()
    return scores.softmax(dim=-1).to(dtype)
