"""Latents equal those that diffusers' pipelines make of an image, for encoders that do more than scale."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, Flux2Pipeline
from safetensors.torch import load_file, save_file

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("costs_not_measured")


def image() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_latents_of_flux2_are_patches_in_their_statistics(tmp_path):
    folder = tiny.folder("flux2_klein_4b", tmp_path)
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae")
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 3)
    vae.save_pretrained(folder / "vae")
    backbone = db.create_model("flux2_klein_4b", recipe=["vit-block0-out"], checkpoint_path=folder)
    pipeline = Flux2Pipeline(vae=vae, transformer=None, text_encoder=None, tokenizer=None, scheduler=None)
    expected = pipeline._encode_vae_image(image(), torch.Generator())
    assert expected.shape == (2, 128, 4, 6)
    torch.testing.assert_close(backbone.encode(image()), expected, rtol=1e-5, atol=1e-5)
    assert "num_batches_tracked" not in "".join(backbone.encoder.state_dict())


@torch.no_grad()
def test_latents_of_qwen_are_the_first_frame_of_a_video(tiny_folder):
    folder = tiny_folder("qwen_image")
    backbone = db.create_model("qwen_image", recipe=["vit-block0-out"], checkpoint_path=folder)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    mode = vae.encode(image()[:, :, None]).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(backbone.encode(image()), ((mode - mean) / std)[:, :, 0], rtol=1e-5, atol=1e-5)
    assert not hasattr(backbone.encoder, "_enc_feat_map")  # nothing of an image stays behind
    whole = sum(p.numel() for p in vae.encoder.parameters())
    assert sum(p.numel() for p in backbone.encoder.parameters()) < whole


def test_a_language_model_without_a_tensor_is_refused(tmp_path):
    folder = tiny.folder("flux2_klein_4b", tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state.pop("model.layers.3.mlp.up_proj.weight")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of Qwen3ForCausalLM, the first is model\.layers\.3\.mlp\.up_proj\.weight"
    ):
        db.create_model("flux2_klein_4b", recipe=["vit-block0-out"], checkpoint_path=folder)
