"""What Lumina-Image 2 and Z-Image share: image and text refined apart, then one sequence of both, whose length differs
from row to row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_backbones.families.transformer.base import Transformer
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FIRST, TEXT_FIRST = "[:, :N]", "[:, T:]"
"""Where the N image tokens of a sequence are; T is the number of text tokens in that row."""


class Layout(NamedTuple):
    """How many blocks a network has, what their parts are called, and how wide those are.

    Args:
        refiners: Blocks of ``noise_refiner``.
        layers: Blocks of ``layers``.
        attention: The attention layer of a block.
        inner: The last projection of its feed-forward layer, whose input is the widest activation.
        channels: Width of the stream.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, each of which serves ``heads / kv_heads`` of the queries.
        inner_channels: Width inside the feed-forward layer.
    """

    refiners: int
    layers: int
    attention: str
    inner: str
    channels: int
    heads: int
    kv_heads: int
    inner_channels: int


class NextDiT(Transformer):
    """Networks with a ``noise_refiner`` for the image, a ``context_refiner`` for the text, and ``layers`` for both.

    The blocks that image tokens pass are numbered through: those of the noise refiner first, ``layers`` after them.

    Attributes:
        tokens: Length that prompts are padded to. The padding is cut off before text and image become one sequence.
        image: Where the image is in the sequence of ``layers``.
    """

    tokens: int
    image: str
    one_graph = False  # lengths of texts are read on the host

    @abstractmethod
    def layout(self, config: Config) -> Layout:
        """What a network with this config is made of."""

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        return Catalogue(self._sites(self.layout(configs["transformer"]), self.size_divisibility(configs)), network)

    def _sites(self, layout: Layout, stride: int) -> Iterator[Site]:
        for i in range(layout.refiners):
            yield from _block(f"noise_refiner.{i}", i, layout, stride, IMAGE_FIRST, ("self-map",))
        for i in range(layout.layers):
            yield from _block(f"layers.{i}", layout.refiners + i, layout, stride, self.image, ("cross-map", "self-map"))

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self.tokens, configs["transformer"]["cap_feat_dim"]),
            "prompt_attention_mask": (self.tokens,),
        }

    def blank_conditioning(self, configs: Configs) -> dict[str, Tensor]:
        """Zeros, and none of them padding: on ``meta`` a prompt costs the most that it can."""
        import torch

        return super().blank_conditioning(configs) | {"prompt_attention_mask": torch.ones(1, self.tokens)}

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder",)

    def activation(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        if site.port.endswith(IMAGE_FIRST):
            return recorded[0][:, : grid[0] * grid[1]]
        if site.port.endswith(TEXT_FIRST):
            return behind_text(recorded[0], text_mask(conditioning), grid[0] * grid[1])
        return super().activation(denoiser, site, recorded, conditioning, grid, average)


def _block(path: str, number: int, layout: Layout, stride: int, image: str, maps: tuple[str, ...]) -> Iterator[Site]:
    """Activations of a block's image tokens, which are at ``image`` in its sequence, in forward order."""
    name, attention, channels = f"vit-block{number}", f"{path}.{layout.attention}", layout.channels
    for qkv, heads in zip("qkv", (layout.heads, layout.kv_heads, layout.kv_heads), strict=True):
        yield Site(
            f"{name}-{qkv}", f"{attention}.to_{qkv}", f"out{image}", channels // layout.heads * heads, stride, "tokens"
        )
    for kind in maps:
        yield Site(f"{name}-{kind}", attention, "map", layout.heads, stride, "attention")
    yield Site(f"{name}-attn-out", attention, f"out{image}", channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.feed_forward", f"in{image}", channels, stride, "tokens")
    yield Site(
        f"{name}-ffn-inner",
        f"{path}.feed_forward.{layout.inner}",
        f"in{image}",
        layout.inner_channels,
        stride,
        "tokens",
    )
    yield Site(f"{name}-out", path, f"out{image}", channels, stride, "tokens")


def text_mask(conditioning: Mapping[str, Tensor]) -> Tensor:
    """(B, T) booleans: true for text, false for padding.

    Raises:
        ValueError: The mask is not as long as the embeddings.
    """
    embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
    if mask.shape != embeds.shape[:2]:
        length = mask.shape[1]
        raise ValueError(
            f"prompt_embeds has {embeds.shape[1]} tokens and prompt_attention_mask {length}; pad the embeddings to "
            "it, and give the mask too"
        )
    return mask.bool()


def behind_text(x: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """(B, sequence, C) with the text of ``mask`` before ``tokens`` of image and padding behind them -> (B, tokens, C)."""
    import torch

    index = mask.sum(1, keepdim=True) + torch.arange(tokens, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def rotated(x: Tensor, norm: Any, rotary: Tensor) -> Tensor:
    """(B, sequence, C) of ``to_q`` or ``to_k`` -> (B, heads, sequence, d), normalised and turned by ``rotary``, which
    is (B, sequence, d / 2) and complex.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    x = x.view(*x.shape[:2], -1, 2 * rotary.shape[-1])
    turned: Tensor = apply_rotary_emb(x if norm is None else norm(x), rotary, use_real=False)
    return turned.transpose(1, 2)
