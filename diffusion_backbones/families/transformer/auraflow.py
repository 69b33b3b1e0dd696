"""AuraFlow: diffusers' ``AuraFlowTransformer2DModel`` behind a KL autoencoder, conditioned on a UMT5 encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, check_positions, width
from diffusion_backbones.families.transformer.joint_attention import Inner, double_block, joint_map, single_block
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 256
"""Length that diffusers' pipeline pads prompts to."""


class AuraFlow(Transformer):
    """The family of ``AuraFlowTransformer2DModel``. Eight learned tokens stand before those of the text."""

    networks = ("AuraFlowTransformer2DModel",)
    registers = 8

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        return Catalogue(_sites(configs["transformer"], self.size_divisibility(configs)), network)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, configs["transformer"]["joint_attention_dim"])}

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder",)

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import AuraFlowTransformer2DModel

        transformer: nn.Module = AuraFlowTransformer2DModel.from_config(config)
        return transformer

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
        return joint_map(
            denoiser.get_submodule(site.path), site, recorded, grid[0] * grid[1], True, None, average, self.registers
        )

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        embeds, mask = language_model.encode(*load("text_encoder"), prompts, TOKENS)
        return {"prompt_embeds": embeds * mask[..., None]}


def _sites(config: Config, stride: int) -> Iterator[Site]:
    """Double blocks are numbered first, single blocks go on from there."""
    channels, heads = width(config), config["num_attention_heads"]
    doubles, singles = config["num_mmdit_layers"], config["num_single_dit_layers"]
    inner = -(-int(2 * 4 * channels / 3) // 256) * 256  # as the layer rounds it
    paths = [f"joint_transformer_blocks.{i}" for i in range(doubles)] + [
        f"single_transformer_blocks.{j}" for j in range(singles)
    ]
    following = [*(f"{path}.norm1.linear" for path in paths[1:]), ""]
    for i, (path, norm) in enumerate(zip(paths, following, strict=True)):
        if i < doubles:
            yield from double_block(path, i, channels, heads, stride, norm, Inner("ff.out_projection", "in", inner))
        else:
            yield from _single(path, i, channels, heads, stride, norm, inner)


def _single(
    path: str, block: int, channels: int, heads: int, stride: int, modulation: str, inner: int
) -> Iterator[Site]:
    """As in FLUX, and the inside of the feed-forward layer, which stands behind attention here."""
    *before, out = single_block(path, block, channels, heads, stride, modulation)
    yield from before
    yield Site(f"vit-block{block}-norm-out", f"{path}.ff", "in[:, T:]", channels, stride, "tokens")
    yield Site(f"vit-block{block}-ffn-inner", f"{path}.ff.out_projection", "in[:, T:]", inner, stride, "tokens")
    yield Site(out.id, path, "out[:, T:]", channels, stride, "tokens", modulation=modulation)
