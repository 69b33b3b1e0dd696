"""Stable Diffusion 3: diffusers' ``SD3Transformer2DModel`` behind a KL autoencoder, conditioned on two CLIP encoders
and T5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, check_positions, width
from diffusion_backbones.families.transformer.joint_attention import double_block, joint_map
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

CLIP_TOKENS, T5_TOKENS = 77, 256
"""Tokens of the text, CLIP's before T5's."""
T5 = "text_encoder_3"


class SD3(Transformer):
    """The family of ``SD3Transformer2DModel`` (SD3 and SD3.5)."""

    networks = ("SD3Transformer2DModel",)

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config, stride = configs["transformer"], self.size_divisibility(configs)
        blocks, channels, heads = range(config["num_layers"]), width(config), config["num_attention_heads"]
        norms = [f"transformer_blocks.{i}.norm1.linear" for i in blocks[1:]] + [""]
        return Catalogue(
            (s for i in blocks for s in double_block(f"transformer_blocks.{i}", i, channels, heads, stride, norms[i])),
            network,
        )

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["transformer"]
        tokens = CLIP_TOKENS + (T5_TOKENS if T5 in self.text_encoder_names(configs) else 0)
        return {
            "prompt_embeds": (tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        """T5 may be left out; the other two also give the pooled embedding."""
        return ("text_encoder", "text_encoder_2", *([T5] if configs.get(T5, {}) is not None else []))

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        transformer: nn.Module = SD3Transformer2DModel.from_config(config)
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        check_positions(z, denoiser.config.pos_embed_max_size * denoiser.config.patch_size, size)
        output: Tensor = denoiser(
            z,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timestep,
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
        return joint_map(denoiser.get_submodule(site.path), site, recorded, grid[0] * grid[1], False, None, average)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        import torch
        import torch.nn.functional as F

        from diffusion_backbones.families.text import clip, language_model

        language_model.check_padding(padding)
        states, pooled = [], []
        first, second, *last = self.text_encoder_names(configs)
        for name in (first, second):
            state, projected = clip.penultimate(*load(name), prompts, "max_length", truncate=bool(last))
            states.append(state)
            pooled.append(projected)
        embeds = torch.cat(states, -1)
        embeds = F.pad(embeds, (0, configs["transformer"]["joint_attention_dim"] - embeds.shape[-1]))
        words = [language_model.encode(*load(name), prompts, T5_TOKENS, masked=False)[0] for name in last]
        return {"prompt_embeds": torch.cat([embeds, *words], 1), "pooled_prompt_embeds": torch.cat(pooled, -1)}
