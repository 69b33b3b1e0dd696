"""What diffusion transformers share: one stride for everything, and blocks that are numbered through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import Architecture
from diffusion_backbones.ops.execution_order import BYPASS, Step, Steps, numbered, stand_in
from diffusion_backbones.spec.activations import IN, MAP, OUT, Site
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Transformer(Architecture):
    """A denoiser of transformer blocks on patches of the latents."""

    denoiser = "transformer"
    encoder = "vae"
    stages = {
        **dict.fromkeys(("transformer_blocks", "joint_transformer_blocks", "blocks"), 1),
        **dict.fromkeys(("noise_refiner", "context_refiner"), 1),
        **dict.fromkeys(("single_transformer_blocks", "layers"), 1001),
        **dict.fromkeys(("norm_out", "proj_out", "proj_out_1", "proj_out_2", "scale_shift_table"), 2000),
        "all_final_layer": 2000,
    }

    @property
    def size_divisibility(self) -> int:
        return self.latent_stride * self.patch

    @property
    def patch(self) -> int:
        """Side of a patch in latent positions."""
        return int(self.config.get("patch_size", 2))

    def fill_buffers(self, denoiser: nn.Module, device: torch.device) -> None:
        """The positions of the native size, where they are a formula and not part of the weights."""
        from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

        for module in denoiser.modules():
            if isinstance(module, PatchEmbed) and module.pos_embed is not None and module.pos_embed.is_meta:
                grid = (module.height, module.width)
                stretch = {"base_size": module.base_size, "interpolation_scale": module.interpolation_scale}
                table = get_2d_sincos_pos_embed(
                    module.pos_embed.shape[-1], grid, device=device, output_type="pt", **stretch
                )
                module.pos_embed = table.float()[None]


def width(config: Config) -> int:
    """Channels of the residual stream."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not less than a number."""
    return -(-number // multiple) * multiple


def check_positions(z: Tensor, limit: int, size: tuple[int, int]) -> None:
    """Check latents against a network's table of positions.

    Args:
        z: (B, C, h, w) latents.
        limit: Latent positions a side that the table has.
        size: Height and width of the image in pixels.

    Raises:
        ValueError: The latents are larger.
    """
    rows, columns = z.shape[-2:]
    if max(rows, columns) > limit:
        stride = size[0] / rows
        raise ValueError(
            f"the network has positions for latents of at most {limit} x {limit}, and those of this {size[0]} x "
            f"{size[1]} image are {rows} x {columns}; give an image of at most {int(limit * stride)} pixels a side"
        )


def projected(*lists: str) -> Steps:
    """The steps of a network that ends in a norm and in a projection, behind which an unpatchify relies on its width.

    Args:
        lists: Names of its lists of blocks, in the order in which they run.
    """

    def steps(network: Any) -> list[Step]:
        out = stand_in(network.proj_out.out_features, dim=-1)
        return [*numbered(network, *lists), Step("norm_out", BYPASS), Step("proj_out", out)]

    return steps


def single_stream(
    path: str, block: int, config: Config, stride: int, cross: bool, modulation: str = "", inner: float = 4
) -> Iterator[Site]:
    """Activations of a block with self-attention, perhaps cross-attention, and a feed-forward layer, in forward order.

    Args:
        path: Of the block.
        block: Its number.
        config: Of the denoiser.
        stride: Pixels per token.
        cross: Whether there is cross-attention.
        modulation: As in :class:`Site`.
        inner: Width inside the feed-forward layer over the width of the stream.
    """
    name, channels, heads = f"vit-block{block}", width(config), config["num_attention_heads"]
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.attn1.to_{qkv}", OUT, channels, stride, "tokens")
    yield Site(f"{name}-self-map", f"{path}.attn1", MAP, heads, stride, "attention")
    yield Site(f"{name}-self-out", f"{path}.attn1", OUT, channels, stride, "tokens")
    if cross:
        yield Site(f"{name}-cross-q", f"{path}.attn2.to_q", OUT, channels, stride, "tokens")
        yield Site(f"{name}-cross-map", f"{path}.attn2", MAP, heads, stride, "attention")
        yield Site(f"{name}-cross-out", f"{path}.attn2", OUT, channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.ff", IN, channels, stride, "tokens", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.ff.net.0", OUT, int(inner * channels), stride, "tokens")
    yield Site(f"{name}-out", path, OUT, channels, stride, "tokens", modulation=modulation)
