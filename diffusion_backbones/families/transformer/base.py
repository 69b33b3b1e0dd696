"""What diffusion transformers share: one stride for everything, and blocks numbered through."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import Family
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Transformer(Family):
    """A denoiser made of transformer blocks on patches of the latent."""

    denoiser = "transformer"
    encoder = "vae"

    def size_divisibility(self, configs: Configs) -> int:
        return self.latent_stride(configs) * self.patch(configs)

    def patch(self, configs: Configs) -> int:
        """Side of a patch in latent positions."""
        return int(configs[self.denoiser].get("patch_size", 2))

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        from diffusion_backbones.families.transformer import execution_order
        from diffusion_backbones.ops.truncation import truncate

        return truncate(denoiser, paths, execution_order.STEPS)

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

    def depth(self, path: str) -> int:
        """Position of a parameter from input to output: embeddings 0, then the blocks, then what is behind them."""
        first = ("transformer_blocks", "joint_transformer_blocks", "blocks", "noise_refiner", "context_refiner")
        second = ("single_transformer_blocks", "layers")
        stage, _, rest = path.partition(".")
        if stage in (*first, *second):
            return 1 + int(rest.split(".")[0]) + (1000 if stage in second else 0)
        return (
            2000
            if stage in ("norm_out", "proj_out", "proj_out_1", "proj_out_2", "scale_shift_table", "all_final_layer")
            else 0
        )


def check_positions(z: Tensor, limit: int, size: tuple[int, int]) -> None:
    """Raise ``ValueError`` if latents are larger than a network's table of positions, ``limit`` latent positions a
    side.
    """
    if max(z.shape[-2:]) > limit:
        stride = size[0] / z.shape[-2]
        raise ValueError(
            f"the network has positions for latents of at most {limit} x {limit}, and those of this {size[0]} x "
            f"{size[1]} image are "
            f"{z.shape[-2]} x {z.shape[-1]}; give an image of at most {int(limit * stride)} pixels a side"
        )


def accepted(network: type, config: Config) -> dict[str, Any]:
    """What of a config the network's constructor takes; older files also hold the settings of a more general class."""
    known = inspect.signature(network).parameters
    return {key: value for key, value in config.items() if key in known}


def width(config: Any) -> int:
    """Channels of the residual stream."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def single_stream(
    path: str, block: int, config: Any, stride: int, cross: bool, modulation: str = "", inner: float = 4
) -> Iterator[Site]:
    """Activations of a block with self-attention, perhaps cross-attention, and an FFN, in forward order.

    Args:
        modulation: As in :class:`Site`.
        inner: Width of the FFN over the width of the stream.
    """
    name, channels, heads = f"vit-block{block}", width(config), config["num_attention_heads"]
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.attn1.to_{qkv}", "out", channels, stride, "tokens")
    yield Site(f"{name}-self-map", f"{path}.attn1", "map", heads, stride, "attention")
    yield Site(f"{name}-self-out", f"{path}.attn1", "out", channels, stride, "tokens")
    if cross:
        yield Site(f"{name}-cross-q", f"{path}.attn2.to_q", "out", channels, stride, "tokens")
        yield Site(f"{name}-cross-map", f"{path}.attn2", "map", heads, stride, "attention")
        yield Site(f"{name}-cross-out", f"{path}.attn2", "out", channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.ff", "in", channels, stride, "tokens", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.ff.net.0", "out", int(inner * channels), stride, "tokens")
    yield Site(f"{name}-out", path, "out", channels, stride, "tokens", modulation=modulation)
