"""diffusers' own pipelines on a folder, as the source of right values. Nothing of the package is used here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

LEVELS = {
    "sd15_gdf": [
        ["up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k"],
        ["up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q"],
        ["up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q", "up_blocks.1.resnets.2"],
    ],
    "sdxl_gdf": [
        ["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q", "up_blocks.1.attentions.0.transformer_blocks.0"],
        ["up_blocks.0.attentions.0.transformer_blocks.5", "up_blocks.0.attentions.0.transformer_blocks.7"],
    ],
}


def pipeline(name: str, folder: Path) -> Any:
    parts = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "scheduler": DDPMScheduler,
        "tokenizer": transformers.CLIPTokenizer,
    }
    parts["text_encoder"] = transformers.CLIPTextModel
    if name == "sdxl":
        parts |= {"tokenizer_2": transformers.CLIPTokenizer, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    loaded = {part: cls.from_pretrained(folder / part) for part, cls in parts.items()}
    if name == "sdxl":
        return StableDiffusionXLPipeline(**loaded)
    return StableDiffusionPipeline(**loaded, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def stock_pyramid(pipe: Any, levels: list[list[str]], x: Tensor, noise: Tensor, t: int, prompt: str) -> list[Tensor]:
    """diffusers' whole pipeline up to one U-Net call, with plain hooks."""
    found: dict[str, Tensor] = {}
    for path in (path for level in levels for path in level):
        pipe.unet.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found.__setitem__(path, out))
    z = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    z = pipe.scheduler.add_noise(z, noise, torch.tensor([t]))
    added = None
    if isinstance(pipe, StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        size = (x.shape[-2], x.shape[-1])
        added = {
            "text_embeds": pooled,
            "time_ids": pipe._get_add_time_ids(size, (0, 0), size, embeds.dtype, pooled.shape[-1]),
        }
    else:
        embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    pipe.unet(z, t, embeds, added_cond_kwargs=added)
    height, width = x.shape[-2], x.shape[-1]
    maps = {}
    for path, act in found.items():
        stride = int((height * width / act.shape[1]) ** 0.5) if act.ndim == 3 else 0
        maps[path] = act.transpose(1, 2).unflatten(2, (height // stride, width // stride)) if stride else act
    return [torch.cat([maps[path] for path in level], dim=1) for level in levels]
