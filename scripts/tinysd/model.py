"""The networks of tinysd, their random start, and the folder that diffusers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VAE_WIDTHS, UNET_WIDTHS = (16, 32, 64, 128), (64, 128, 192, 192)
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 96,
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


def vae(widths: tuple[int, ...] = VAE_WIDTHS) -> AutoencoderKL:
    """A KL VAE of stride 8 with four channels and random weights, whose encoder starts with little noise."""
    network = AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=2,
        layers_per_block=2,
        sample_size=256,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    initialise(network)
    with torch.no_grad():
        network.quant_conv.weight[4:] *= 0.1
        network.quant_conv.bias[4:] = -4
    return network


class Denoiser(nn.Module):
    """The U-Net and the text encoder, which are trained together."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z, t, self.text(ids).last_hidden_state).sample


def denoiser(tokens: CLIPTokenizer, widths: tuple[int, ...] = UNET_WIDTHS) -> Denoiser:
    """Both with random weights; the U-Net's answer starts at zero."""
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT["hidden_size"],
        sample_size=32,
    )
    initialise(unet)
    nn.init.zeros_(unet.conv_out.weight)
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return Denoiser(unet, CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **TEXT, **special)))


def initialise(model: nn.Module) -> None:
    """Random weights that keep the size of a signal, no biases, and residual branches that start at zero.

    torch's default shrinks a signal at every convolution until constant biases outweigh it, and a VAE then spends
    thousands of steps on the mean colour. Residual branches that start at zero: Dhariwal and Nichol, arXiv 2105.05233,
    and common since.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)


def export(image: AutoencoderKL, trained: Denoiser, tokens: Path, target: Path) -> None:
    """Write a diffusers folder in float16."""
    shutil.rmtree(target, ignore_errors=True)
    image.half().save_pretrained(target / "vae")
    trained.unet.half().save_pretrained(target / "unet")
    trained.text.half().save_pretrained(target / "text_encoder")
    for config in target.glob("*/config.json"):  # diffusers notes where it was read, which is of this machine alone
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1).save_pretrained(target / "scheduler")
    shutil.copytree(tokens, target / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")
    if size > 64e6:
        raise SystemExit(f"{target} has {size / 1e6:.1f} MB, expected at most 64. Take smaller widths.")
