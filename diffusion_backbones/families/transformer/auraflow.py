"""AuraFlow: diffusers' ``AuraFlowTransformer2DModel`` behind a KL autoencoder, conditioned on a UMT5 encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import T5
from diffusion_backbones.families.transformer.base import Transformer, check_positions, projected, round_up, width
from diffusion_backbones.families.transformer.joint_attention import (
    BEHIND_TEXT,
    IN_BEHIND_TEXT,
    Inner,
    double_block,
    joint_block,
    joint_map,
    single_block,
)
from diffusion_backbones.ops.execution_order import ExecutionOrder
from diffusion_backbones.spec.activations import IN, Site

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 256
"""Length that diffusers' pipeline pads prompts to."""


class AuraFlow(Transformer):
    """The family of ``AuraFlowTransformer2DModel``. Eight learned tokens stand before those of the text."""

    networks = ("AuraFlowTransformer2DModel",)
    registers = 8
    text_encoders = ("text_encoder",)
    order = ExecutionOrder(
        steps={
            "AuraFlowTransformer2DModel": projected("joint_transformer_blocks", "single_transformer_blocks"),
            "AuraFlowJointTransformerBlock": joint_block,
            "AuraFlowSingleTransformerBlock": joint_block,
        },
        modulated=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        two_streams=("AuraFlowJointTransformerBlock",),
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": T5["d_model"],
            "caption_projection_dim": 16,
        }
        configs["text_encoder"] |= T5

    def sites(self) -> Iterator[Site]:
        """Double blocks are numbered first, single blocks go on from there."""
        channels, heads = width(self.config), self.config["num_attention_heads"]
        doubles, singles = self.config["num_mmdit_layers"], self.config["num_single_dit_layers"]
        inner = round_up(int(2 * 4 * channels / 3), 256)  # as the layer rounds it
        paths = [f"joint_transformer_blocks.{i}" for i in range(doubles)]
        paths += [f"single_transformer_blocks.{i}" for i in range(singles)]
        following = [*(f"{path}.norm1.linear" for path in paths[1:]), ""]
        for i, (path, norm) in enumerate(zip(paths, following, strict=True)):
            block = (path, i, channels, heads, self.size_divisibility, norm)
            if i < doubles:
                yield from double_block(*block, Inner("ff.out_projection", IN, inner))
            else:
                yield from _single(*block, inner)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.config["joint_attention_dim"])}

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        config = denoiser.config
        check_positions(z, int(config.pos_embed_max_size**0.5) * config.patch_size, size)
        output: Tensor = denoiser(
            z, encoder_hidden_states=conditioning["prompt_embeds"], timestep=timestep.to(z) / 1000, return_dict=False
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
        layer = denoiser.get_submodule(site.path)
        return joint_map(layer, site, recorded, grid[0] * grid[1], True, None, average, self.registers)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        embeds, mask = language_model.encode(*load("text_encoder"), prompts, TOKENS)
        return {"prompt_embeds": embeds * mask[..., None]}


def _single(
    path: str, block: int, channels: int, heads: int, stride: int, modulation: str, inner: int
) -> Iterator[Site]:
    """As in FLUX, and the inside of the feed-forward layer, which stands behind attention here."""
    *before, out = single_block(path, block, channels, heads, stride, modulation)
    name = f"vit-block{block}"
    yield from before
    yield Site(f"{name}-norm-out", f"{path}.ff", IN_BEHIND_TEXT, channels, stride, "tokens")
    yield Site(f"{name}-ffn-inner", f"{path}.ff.out_projection", IN_BEHIND_TEXT, inner, stride, "tokens")
    yield Site(out.id, path, BEHIND_TEXT, channels, stride, "tokens", modulation=modulation)
