"""Hunyuan-DiT: diffusers' ``HunyuanDiT2DModel`` behind a KL autoencoder, conditioned on a BERT and a T5 encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward
from diffusion_backbones.families.tiny import T5, WORDS
from diffusion_backbones.families.transformer.base import Transformer, projected, single_stream
from diffusion_backbones.ops.execution_order import ExecutionOrder, in_order
from diffusion_backbones.spec.activations import Site

if TYPE_CHECKING:
    from torch import Tensor

BASE = 512
"""Side in pixels of the square that rotary positions are stretched over, whatever the size (diffusers' pipeline)."""


class Hunyuan(Transformer):
    """The family of ``HunyuanDiT2DModel``. The later half of its blocks also reads the outputs of the earlier half."""

    networks = ("HunyuanDiT2DModel",)
    text_encoders = ("text_encoder", "text_encoder_2")
    order = ExecutionOrder(
        steps={
            "HunyuanDiT2DModel": projected("blocks"),
            "HunyuanDiTBlock": in_order("attn1", "norm2", "attn2", "norm3", "ff"),
            "FeedForward": feed_forward,
        }
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        bert = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 16,
            "cross_attention_dim": bert["hidden_size"],
            "cross_attention_dim_t5": T5["d_model"],
            "pooled_projection_dim": 16,
        }
        configs["text_encoder"] |= bert | {"vocab_size": WORDS["vocab_size"]}
        configs["text_encoder_2"] |= T5

    def sites(self) -> Iterator[Site]:
        config, stride, ratio = self.config, self.size_divisibility, self.config["mlp_ratio"]
        for i in range(config["num_layers"]):
            yield from single_stream(f"blocks.{i}", i, config, stride, cross=True, inner=ratio)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config
        return {
            "prompt_embeds": (config["text_len"], config["cross_attention_dim"]),
            "prompt_attention_mask": (config["text_len"],),
            "prompt_embeds_2": (config["text_len_t5"], config["cross_attention_dim_t5"]),
            "prompt_attention_mask_2": (config["text_len_t5"],),
        }

    @property
    def text_tokens(self) -> int:
        """Both encoders' tokens, BERT's first."""
        return int(self.config["text_len"] + self.config["text_len_t5"])

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

        from diffusion_backbones.ops.attention_maps import probabilities, split_heads  # torch

        layer = denoiser.get_submodule(site.path)
        rotary = _rotary(denoiser, *grid, recorded[0])
        norms = (layer.norm_q, layer.norm_k)
        q, k = (split_heads(layer, x, norm) for x, norm in zip(recorded, norms, strict=True))
        q = apply_rotary_emb(q, rotary)
        k = apply_rotary_emb(k, rotary) if site.path.endswith("attn1") else k
        return probabilities(q, k, slice(None), average)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        rows: dict[str, Tensor] = {}
        for name, number in zip(self.text_encoders, ("", "_2"), strict=True):
            embeds, mask = f"prompt_embeds{number}", f"prompt_attention_mask{number}"
            tokens = self.conditioning_shapes[embeds][0]
            rows[embeds], rows[mask] = language_model.encode(*load(name), prompts, tokens)
        return rows


def _rotary(denoiser: Any, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of a grid of patches, as diffusers' pipeline computes them."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    config, grid = denoiser.config, (height, width)
    corners = get_resize_crop_region_for_grid(grid, BASE // 8 // config.patch_size)
    cos, sin = get_2d_rotary_pos_embed(config.attention_head_dim, corners, grid, device=like.device, output_type="pt")
    return cos.to(like.device), sin.to(like.device)
