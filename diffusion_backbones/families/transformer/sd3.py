"""Stable Diffusion 3: diffusers' ``SD3Transformer2DModel`` behind a KL autoencoder, conditioned on two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward
from diffusion_backbones.families.tiny import CLIP
from diffusion_backbones.families.tiny import T5 as TINY_T5
from diffusion_backbones.families.transformer.base import check_positions, projected, width
from diffusion_backbones.families.transformer.concept_outputs import ConceptOutputs
from diffusion_backbones.families.transformer.joint_attention import double_block, joint_block, joint_map
from diffusion_backbones.ops.execution_order import ExecutionOrder
from diffusion_backbones.spec.activations import Site

if TYPE_CHECKING:
    from torch import Tensor

CLIP_TOKENS, T5_TOKENS = 77, 256
"""Tokens of the text, CLIP's before T5's."""
T5 = "text_encoder_3"


class SD3(ConceptOutputs):
    """The family of ``SD3Transformer2DModel`` (SD3 and SD3.5)."""

    networks = ("SD3Transformer2DModel",)
    shifted = True
    order = ExecutionOrder(
        steps={
            "SD3Transformer2DModel": projected("transformer_blocks"),
            "JointTransformerBlock": joint_block,
            "FeedForward": feed_forward,
        },
        modulated=("JointTransformerBlock",),
        two_streams=("JointTransformerBlock",),
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": TINY_T5["d_model"],
            "pooled_projection_dim": 2 * CLIP["projection_dim"],
        }
        configs["text_encoder"] |= CLIP
        configs["text_encoder_2"] |= CLIP
        configs["text_encoder_3"] |= TINY_T5

    def sites(self) -> Iterator[Site]:
        channels, heads = width(self.config), self.config["num_attention_heads"]
        blocks = range(self.config["num_layers"])
        norms = [*(f"transformer_blocks.{i}.norm1.linear" for i in blocks[1:]), ""]
        for i in blocks:
            yield from double_block(f"transformer_blocks.{i}", i, channels, heads, self.size_divisibility, norms[i])

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = CLIP_TOKENS + (T5_TOKENS if T5 in self.text_encoders else 0)
        return {
            "prompt_embeds": (tokens, self.config["joint_attention_dim"]),
            "pooled_prompt_embeds": (self.config["pooled_projection_dim"],),
        }

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """T5 may be left out; the other two also give the pooled embedding."""
        return ("text_encoder", "text_encoder_2", *([T5] if self.configs.get(T5, {}) is not None else []))

    @property
    def text_blocks(self) -> int:
        return super().text_blocks - 1

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

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        import torch
        import torch.nn.functional as F

        from diffusion_backbones.families.text import clip, language_model  # torch

        language_model.check_padding(padding)
        states, pooled = [], []
        first, second, *last = self.text_encoders
        for name in (first, second):
            state, projected = clip.penultimate(*load(name), prompts, "max_length", truncate=bool(last))
            states.append(state)
            pooled.append(projected)
        embeds = torch.cat(states, -1)
        embeds = F.pad(embeds, (0, self.config["joint_attention_dim"] - embeds.shape[-1]))
        words = [language_model.encode(*load(name), prompts, T5_TOKENS, masked=False)[0] for name in last]
        return {"prompt_embeds": torch.cat([embeds, *words], 1), "pooled_prompt_embeds": torch.cat(pooled, -1)}
