"""What the tiny configs of several families share: small text encoders of every kind, and a small image encoder.

Each family shrinks its own denoiser (:meth:`~diffusion_backbones.families.base.Architecture.tiny`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = {"vocab_size": 1796, "bos_token_id": 1794, "eos_token_id": 1795, "pad_token_id": 1795}
"""Vocabulary of the tokenizer in ``configs/tinysd``, which tests give to every text encoder but T5."""
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "vocab_size": 60}
CLIP = {
    "hidden_size": 8,
    "projection_dim": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    **WORDS,
}
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    **WORDS,
}
"""A language model that also writes."""


def shrink_vae(configs: Mapping[str, dict[str, Any]]) -> None:
    """Shrink the widths of an ``AutoencoderKL`` in place; those of other classes are left to their families."""
    vae = configs.get("vae", {})
    if vae.get("_class_name") == "AutoencoderKL":
        vae |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64}
