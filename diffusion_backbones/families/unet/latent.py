"""Latent U-Nets: diffusers' ``UNet2DConditionModel`` behind a KL autoencoder (SD 1.x, SD 2.x, SDXL and their
relatives).

The first half is arithmetic on the architecture config and needs no torch; the second half builds, cuts and calls the
stock network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import Family, LoadText
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

Vit = Callable[[str, str, int, int, int, int], Iterator[Site]]
"""Stage of the ids, module path, width, stride, number of blocks, heads -> the activations of what attends there."""


class UNet(Family):
    """The family of ``UNet2DConditionModel``."""

    denoiser = "unet"
    encoder = "vae"
    networks = ("UNet2DConditionModel",)

    def recognises(self, config: Config) -> bool:
        """Not those that add the text or an image in another way, as DeepFloyd IF and Kandinsky do."""
        return super().recognises(config) and config.get("addition_embed_type") in (None, "text_time")

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        return Catalogue(sites(configs["unet"], self.latent_stride(configs)), network)

    def size_divisibility(self, configs: Configs) -> int:
        return self.latent_stride(configs) * int(2 ** (len(configs["unet"]["block_out_channels"]) - 1))

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["unet"]
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (77, config["cross_attention_dim"])}
        if _has_added_text(config):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            shapes["pooled_prompt_embeds"] = (pooled,)
        return shapes

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if _has_added_text(configs["unet"]) else ("text_encoder",)

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import UNet2DConditionModel

        unet: nn.Module = UNet2DConditionModel.from_config(config)
        return unet

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        from diffusion_backbones.families.unet import execution_order
        from diffusion_backbones.ops.truncation import truncate

        return truncate(denoiser, paths, execution_order.STEPS)

    def call(
        self,
        denoiser: nn.Module,
        z: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Tensor],
        size: tuple[int, int],
    ) -> Tensor:
        added = None
        if "pooled_prompt_embeds" in conditioning:
            ids = z.new_tensor([*size, 0, 0, *size]).expand(z.shape[0], 6)  # original size, crop corner, target size
            added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": ids}
        output: Tensor = denoiser(
            z, timestep, encoder_hidden_states=conditioning["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text.clip import encode

        return encode(load, prompts, padding, self.text_encoder_names(configs))

    def depth(self, path: str) -> int:
        """Position of a parameter from input to output: embeddings and ``conv_in`` 0, then down, mid and up blocks."""
        stage, _, rest = path.partition(".")
        index = int(rest.split(".")[0]) if rest[:1].isdigit() else 0
        return {
            "down_blocks": 1 + index,
            "mid_block": 100,
            "up_blocks": 101 + index,
            "conv_norm_out": 200,
            "conv_out": 200,
        }.get(stage, 0)


def _has_added_text(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _per_level(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


def sites(config: Config, latent_stride: int, plain_mid: Vit | None = None) -> Iterator[Site]:
    """Every activation of a ``UNet2DConditionModel`` with this config, in forward order.

    ``plain_mid`` gives those of the attention in a middle block without cross-attention, if it has one.

    Levels, widths and depths follow the constructor of that class; the tests compare them with the built network.
    """
    widths = list(config["block_out_channels"])
    n = len(widths)
    repeats = _per_level(config.get("layers_per_block", 2), n)
    depths = _per_level(config.get("transformer_layers_per_block", 1), n)
    heads = _per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), n)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]

    yield Site("unet-in", "conv_in", "in", config.get("in_channels", 4), latent_stride, "map")
    yield Site("unet-after-conv-in", "conv_in", "out", widths[0], latent_stride, "map")
    for level, kind in enumerate(config["down_block_types"]):
        stride, stage, prefix = latent_stride * 2**level, f"down-level{level}", f"down_blocks.{level}"
        for repeat, depth in enumerate(_per_level(depths[level], repeats[level])):
            yield from _residual(f"{stage}-repeat{repeat}", f"{prefix}.resnets.{repeat}", widths[level], stride)
            if vit := _attends(kind):
                yield from vit(
                    f"{stage}-repeat{repeat}",
                    f"{prefix}.attentions.{repeat}",
                    widths[level],
                    stride,
                    depth,
                    heads[level],
                )
        if level < n - 1:
            yield Site(f"{stage}-downsampler-out", f"{prefix}.downsamplers.0", "out", widths[level], 2 * stride, "map")

    mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    stride = latent_stride * 2 ** (n - 1)
    if mid is not None:
        yield from _residual("mid-repeat0", "mid_block.resnets.0", widths[-1], stride)
    if mid_vit := _attends(mid or "") or plain_mid:
        depth = _per_level(depths[-1], 1)[0]
        yield from mid_vit("mid", "mid_block.attentions.0", widths[-1], stride, depth, heads[-1])
        yield from _residual("mid-repeat1", "mid_block.resnets.1", widths[-1], stride)

    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (repeats[level] + (level < n - 1))
    entering = widths[-1]
    for level, kind in enumerate(config["up_block_types"]):
        stride, stage, prefix = latent_stride * 2 ** (n - 1 - level), f"up-level{level}", f"up_blocks.{level}"
        width = widths[n - 1 - level]
        for repeat, depth in enumerate(_per_level(up_depths[level], repeats[n - 1 - level] + 1)):
            yield Site(
                f"{stage}-repeat{repeat}-res-in",
                f"{prefix}.resnets.{repeat}.norm1",
                "in",
                entering + skips.pop(),
                stride,
                "map",
            )
            entering = width
            yield from _residual(f"{stage}-repeat{repeat}", f"{prefix}.resnets.{repeat}", width, stride)
            if vit := _attends(kind):
                yield from vit(
                    f"{stage}-repeat{repeat}",
                    f"{prefix}.attentions.{repeat}",
                    width,
                    stride,
                    depth,
                    heads[n - 1 - level],
                )
        if level < n - 1:
            yield Site(f"{stage}-upsampler-out", f"{prefix}.upsamplers.0", "out", width, stride // 2, "map")
    yield Site("unet-out", "conv_out", "out", config.get("out_channels", 4), latent_stride, "map")


def _attends(kind: str) -> Vit | None:
    """What attends in a block of this class."""
    known = {"SimpleCrossAttn": added_attention, "CrossAttn": _vit, "Attn": plain_attention}
    return next((vit for name, vit in known.items() if name in kind), None)


def _residual(id: str, path: str, width: int, stride: int) -> Iterator[Site]:
    yield Site(f"{id}-res-increment", f"{path}.conv2", "out", width, stride, "map")
    yield Site(f"{id}-res-out", path, "out", width, stride, "map")


def plain_attention(id: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    """A layer of self-attention with no transformer around it."""
    name = f"{id}-vit-block0"
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.to_{qkv}", "out", width, stride, "tokens")
    yield Site(f"{name}-self-map", path, "map", heads, stride, "attention")
    yield Site(f"{id}-vit-out", path, "out", width, stride, "map")


def added_attention(id: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    """A layer of attention to the text and the image at once: one query, and one softmax over the keys of both."""
    name, taps = f"{id}-vit-block0", ("to_q", "add_k_proj", "to_k")
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.to_{qkv}", "out", width, stride, "tokens")
    yield Site(f"{name}-self-map", path, "map", heads, stride, "attention", taps)
    yield Site(f"{name}-cross-map", path, "map", heads, stride, "attention", taps)
    yield Site(f"{id}-vit-out", path, "out", width, stride, "map")


def _vit(id: str, path: str, width: int, stride: int, depth: int, heads: int) -> Iterator[Site]:
    for block in range(depth):
        name, at = f"{id}-vit-block{block}", f"{path}.transformer_blocks.{block}"
        for qkv in "qkv":
            yield Site(f"{name}-self-{qkv}", f"{at}.attn1.to_{qkv}", "out", width, stride, "tokens")
        yield Site(f"{name}-self-map", f"{at}.attn1", "map", heads, stride, "attention")
        yield Site(f"{name}-self-out", f"{at}.attn1", "out", width, stride, "tokens")
        yield Site(f"{name}-cross-q", f"{at}.attn2.to_q", "out", width, stride, "tokens")
        yield Site(f"{name}-cross-map", f"{at}.attn2", "map", heads, stride, "attention")
        yield Site(f"{name}-cross-out", f"{at}.attn2", "out", width, stride, "tokens")
        yield Site(f"{name}-ffn-inner", f"{at}.ff.net.0", "out", 4 * width, stride, "tokens")
        yield Site(f"{name}-out", at, "out", width, stride, "tokens")
    yield Site(f"{id}-vit-out", path, "out[0]", width, stride, "map")
