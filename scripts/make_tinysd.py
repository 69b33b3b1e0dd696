"""Write the untrained checkpoint that travels in the package: the topology of Stable Diffusion 1.x at small width.

Every activation id of SD 1.5 exists on it and every recipe of SD 1.5 runs on it. Its weights are random, so its features
show the structure of a random network and nothing learned.

    python scripts/make_tinysd.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from torchvision.transforms.functional import to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
UNET = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 32, "sample_size": 32}
VAE = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8, "layers_per_block": 2, "sample_size": 256,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 32}


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with no merges: one token a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    tokens = tokenizer()
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    vae = AutoencoderKL(**VAE)
    photo = to_tensor(Image.open(ROOT / "docs/cat.jpg").convert("RGB"))[None] * 2 - 1
    vae.register_to_config(scaling_factor=round(1 / vae.encode(photo).latent_dist.mode().std().item(), 4))
    unet = UNet2DConditionModel(**UNET)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **TEXT, **ids))
    for component, name in ((unet, "unet"), (vae, "vae"), (text, "text_encoder")):
        component.half().save_pretrained(folder / name)
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    tokens.save_pretrained(folder / "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "diffusion_backbones/configs/tinysd")
