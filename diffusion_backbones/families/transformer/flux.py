"""FLUX.1: diffusers' ``FluxTransformer2DModel`` behind a KL autoencoder, conditioned on CLIP and T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, width
from diffusion_backbones.families.transformer.joint_attention import double_block, joint_map, single_block
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

GUIDANCE = 3.5
"""What guidance-distilled weights are told unless a call says otherwise; the default of diffusers' pipeline."""
TOKENS = {True: 512, False: 256}
"""Length of the T5 prompt, with guidance (dev) and without (schnell, which was distilled at 256)."""


class Flux(Transformer):
    """The family of ``FluxTransformer2DModel``. Patches are packed into channels before the network."""

    networks = ("FluxTransformer2DModel",)

    def patch(self, configs: Configs) -> int:
        return 2

    def latent_channels(self, configs: Configs) -> int:
        return int(configs["transformer"]["in_channels"]) // 4

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        return Catalogue(_sites(configs["transformer"], self.size_divisibility(configs)), network)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["transformer"]
        tokens = TOKENS[bool(config.get("guidance_embeds"))]
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }
        return shapes | ({"guidance": ()} if config.get("guidance_embeds") else {})

    def blank_conditioning(self, configs: Configs) -> dict[str, Tensor]:
        return super().blank_conditioning(configs) | self._guidance(configs, 1)

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2")

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        transformer: nn.Module = FluxTransformer2DModel.from_config(config)
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        b, c, h, w = z.shape
        packed = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        text = conditioning["prompt_embeds"]
        output: Tensor = denoiser(
            packed,
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timestep.to(z) / 1000,
            img_ids=_positions(z, h // 2, w // 2),
            txt_ids=z.new_zeros(text.shape[1], 3),
            guidance=conditioning.get("guidance"),
            return_dict=False,
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
        import torch
        from diffusers.models.embeddings import apply_rotary_emb

        q = recorded[0]
        ids = torch.cat([q.new_zeros(conditioning["prompt_embeds"].shape[1], 3), _positions(q, *grid)])
        rotary = denoiser.pos_embed(ids)

        def rotate(x: Tensor) -> Tensor:
            rotated: Tensor = apply_rotary_emb(x, rotary, sequence_dim=2)
            return rotated

        return joint_map(denoiser.get_submodule(site.path), site, recorded, grid[0] * grid[1], True, rotate, average)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import clip, language_model

        language_model.check_padding(padding)
        pooled = clip.pooled(*load("text_encoder"), prompts)
        embeds, _ = language_model.encode(
            *load("text_encoder_2"), prompts, self.conditioning_shapes(configs)["prompt_embeds"][0], masked=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled} | self._guidance(configs, len(prompts))

    def _guidance(self, configs: Configs, rows: int) -> dict[str, Tensor]:
        import torch

        return {"guidance": torch.full((rows,), GUIDANCE)} if configs["transformer"].get("guidance_embeds") else {}


def _sites(config: Config, stride: int) -> Iterator[Site]:
    """Double blocks are numbered first, single blocks go on from there."""
    channels, heads, doubles, singles = (
        width(config),
        config["num_attention_heads"],
        config["num_layers"],
        config["num_single_layers"],
    )
    norms = [f"transformer_blocks.{i}.norm1.linear" for i in range(doubles)] + [
        f"single_transformer_blocks.{j}.norm.linear" for j in range(singles)
    ]
    following = [*norms[1:], ""]
    for i in range(doubles):
        yield from double_block(f"transformer_blocks.{i}", i, channels, heads, stride, following[i])
    for j in range(singles):
        yield from _single(
            f"single_transformer_blocks.{j}", doubles + j, channels, heads, stride, following[doubles + j]
        )


def _single(path: str, block: int, channels: int, heads: int, stride: int, modulation: str) -> Iterator[Site]:
    """And the feed-forward layer, which runs beside attention on the same normalised stream; GDF has no ids there."""
    *before, out = single_block(path, block, channels, heads, stride, modulation)
    yield from before
    yield Site(
        f"vit-block{block}-norm-out", f"{path}.proj_mlp", "in[:, T:]", channels, stride, "tokens", extension=True
    )
    yield Site(
        f"vit-block{block}-ffn-inner", f"{path}.act_mlp", "out[:, T:]", 4 * channels, stride, "tokens", extension=True
    )
    yield out


def _positions(like: Tensor, height: int, width: int) -> Tensor:
    """(height · width, 3) of (0, row, column), as the network's rotary positions take them."""
    import torch

    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    return torch.stack(
        [torch.zeros(height, width).to(like), rows[:, None].expand(height, width), columns.expand(height, width)], -1
    ).flatten(0, 1)
