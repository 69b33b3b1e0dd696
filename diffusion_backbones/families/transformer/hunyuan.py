"""Hunyuan-DiT: diffusers' ``HunyuanDiT2DModel`` behind a KL autoencoder, conditioned on a BERT and a T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, accepted, single_stream
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

BASE = 512
"""Side in pixels of the square whose positions the rotary embedding is stretched over, whatever the size (diffusers'
pipeline).
"""


class Hunyuan(Transformer):
    """The family of ``HunyuanDiT2DModel``. The later half of its blocks also reads the outputs of the earlier half."""

    networks = ("HunyuanDiT2DModel",)

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config, stride = configs["transformer"], self.size_divisibility(configs)
        blocks, ratio = range(config["num_layers"]), config["mlp_ratio"]
        return Catalogue(
            (site for i in blocks for site in single_stream(f"blocks.{i}", i, config, stride, cross=True, inner=ratio)),
            network,
        )

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["transformer"]
        return {
            "prompt_embeds": (config["text_len"], config["cross_attention_dim"]),
            "prompt_attention_mask": (config["text_len"],),
            "prompt_embeds_2": (config["text_len_t5"], config["cross_attention_dim_t5"]),
            "prompt_attention_mask_2": (config["text_len_t5"],),
        }

    def text_tokens(self, configs: Configs) -> int:
        """Both encoders' tokens, BERT's first."""
        return int(configs["transformer"]["text_len"] + configs["transformer"]["text_len_t5"])

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2")

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import HunyuanDiT2DModel

        transformer: nn.Module = HunyuanDiT2DModel(**accepted(HunyuanDiT2DModel, config))
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        patch, added = denoiser.config.patch_size, {}
        if denoiser.config.use_style_cond_and_image_meta_size:  # version 1.1 and before
            sizes = z.new_tensor([*size, *size, 0, 0]).repeat(z.shape[0], 1)  # original size, target size, crop corner
            added = {"image_meta_size": sizes, "style": timestep.new_zeros(z.shape[0]).long()}
        output: Tensor = denoiser(
            z,
            timestep.to(z),  # in the latents' dtype, which the embedding of the timestep takes over
            encoder_hidden_states=conditioning["prompt_embeds"],
            text_embedding_mask=conditioning["prompt_attention_mask"],
            encoder_hidden_states_t5=conditioning["prompt_embeds_2"],
            text_embedding_mask_t5=conditioning["prompt_attention_mask_2"],
            image_rotary_emb=_rotary(denoiser, z.shape[-2] // patch, z.shape[-1] // patch, z),
            return_dict=False,
            **added,
        )[0]
        return output

    def attention(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        from diffusion_backbones.ops.attention_maps import probabilities, split_heads

        attention: Any = denoiser.get_submodule(site.path)
        rotary = _rotary(denoiser, *grid, recorded[0])
        q, k = (
            split_heads(attention, x, norm)
            for x, norm in zip(recorded, (attention.norm_q, attention.norm_k), strict=True)
        )
        q = apply_rotary_emb(q, rotary)
        k = apply_rotary_emb(k, rotary) if site.path.endswith("attn1") else k
        return probabilities(q, k, slice(None), average)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        shapes = self.conditioning_shapes(configs)
        rows: dict[str, Tensor] = {}
        for name, number in zip(self.text_encoder_names(configs), ("", "_2"), strict=True):
            tokens = shapes[f"prompt_embeds{number}"][0]
            rows[f"prompt_embeds{number}"], rows[f"prompt_attention_mask{number}"] = language_model.encode(
                *load(name), prompts, tokens
            )
        return rows


def _rotary(denoiser: Any, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of a grid of patches, as diffusers' pipeline computes them."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    config = denoiser.config
    corners = get_resize_crop_region_for_grid((height, width), BASE // 8 // config.patch_size)
    cos, sin = get_2d_rotary_pos_embed(
        config.attention_head_dim, corners, (height, width), device=like.device, output_type="pt"
    )
    return cos.to(like.device), sin.to(like.device)
