"""Tiny checkpoints of the real topologies, in the real formats, with random weights.

``folder(name, path)`` writes what a hub repository of that checkpoint holds: U-Net, VAE, scheduler, text encoders and
tokenizers. Depths, block types, conditioning and flags are the declared ones; only widths shrink.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from diffusion_backbones.registry import CONFIGS, get_checkpoint, package_configs

TOKENIZER = CONFIGS / "tinysd" / "tokenizer"
WORDS = {key: package_configs(get_checkpoint("tinysd"))["text_encoder"][key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
CROSS, POOLED, TIME = 32, 16, 8


def configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of a registered checkpoint, shrunk."""
    out = {k: dict(copy.deepcopy(v)) for k, v in package_configs(get_checkpoint(name)).items() if not k.startswith("tokenizer")}
    unet = out["unet"]
    n = len(unet["block_out_channels"])
    unet |= {"block_out_channels": [16, 32, 64, 64][:n], "norm_num_groups": 8, "cross_attention_dim": CROSS, "sample_size": 8}
    unet["attention_head_dim"] = 8 if isinstance(unet["attention_head_dim"], int) else [1, 2, 4, 4][:n]
    text = {"hidden_size": CROSS, "projection_dim": CROSS, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **WORDS}
    out["text_encoder"] |= text
    if "text_encoder_2" in out:
        out["text_encoder"] |= {"hidden_size": CROSS // 2, "projection_dim": CROSS // 2}
        out["text_encoder_2"] |= text | {"hidden_size": CROSS // 2, "projection_dim": POOLED}
        unet |= {"addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": POOLED + 6 * TIME}
    out["vae"] |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64}
    return out


def build(name: str, seed: int = 0) -> dict[str, Any]:
    """Stock networks of a tiny checkpoint, float32, eval: ``unet``, ``vae``, ``text_encoder`` and perhaps ``text_encoder_2``."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    c = configs(name)
    out: dict[str, Any] = {"unet": UNet2DConditionModel.from_config(c["unet"]).eval(), "vae": AutoencoderKL.from_config(c["vae"]).eval()}
    for text in ("text_encoder", "text_encoder_2"):
        if text in c:
            cls = getattr(transformers, c[text]["architectures"][0])
            out[text] = cls(transformers.CLIPTextConfig(**{k: v for k, v in c[text].items() if k != "architectures"})).eval()
    return out


def folder(name: str, path: Path, seed: int = 0, **save: Any) -> Path:
    """Write a tiny checkpoint as a diffusers folder; ``save`` goes to ``save_pretrained`` (``variant``, ``max_shard_size``)."""
    c = configs(name)
    for component, network in build(name, seed).items():
        network.save_pretrained(path / component, **save)
    (path / "scheduler").mkdir(parents=True, exist_ok=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(c["scheduler"]))
    for number in ("", "_2") if "text_encoder_2" in c else ("",):
        shutil.copytree(TOKENIZER, path / f"tokenizer{number}", dirs_exist_ok=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return path
